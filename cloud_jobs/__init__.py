"""Training jobs in the cloud, and the storage they read and write.

`storage` is the local S3-compatible server: `from cloud_jobs.storage import StorageServer`.
"""
