"""What the storage server refuses, in S3's own words.

Codes and statuses: docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html. Two are not on
AWS's list: QuotaExceeded is Ceph's code, InsufficientStorage is HTTP's own status 507, which no
client repeats by itself as it does a 500.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

ERRORS: dict[str, tuple[int, str]] = {
    "AccessControlListNotSupported": (400, "This server keeps no ACLs; only private is accepted."),
    "AccessDenied": (403, "Access Denied"),
    "AuthorizationHeaderMalformed": (400, "The authorization header is malformed."),
    "AuthorizationQueryParametersError": (400, "The query's signature parameters are malformed."),
    "BadDigest": (400, "The digest or checksum you specified did not match what we received."),
    "BucketAlreadyOwnedByYou": (409, "The bucket exists already, and you own it."),
    "BucketNotEmpty": (409, "The bucket you tried to delete is not empty."),
    "EntityTooLarge": (400, "Your proposed upload exceeds the maximum allowed object size."),
    "EntityTooSmall": (400, "A part other than the last is smaller than 5 MiB."),
    "ExpiredToken": (400, "The access key has expired."),
    "IncompleteBody": (400, "The body is not as long as the request's headers say."),
    "InsufficientStorage": (507, "The server's disk is full."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "InvalidAccessKeyId": (403, "The access key you provided does not exist here."),
    "InvalidArgument": (400, "Invalid argument."),
    "InvalidBucketName": (400, "The specified bucket is not valid."),
    "InvalidDigest": (400, "The Content-MD5 or checksum you specified is not valid."),
    "InvalidPart": (400, "A part was not uploaded, or its ETag or checksum is another one."),
    "InvalidPartOrder": (400, "The list of parts was not in ascending order."),
    "InvalidRange": (416, "The requested range is not satisfiable."),
    "InvalidRequest": (400, "The request is not valid."),
    "InvalidURI": (400, "The request's path or query cannot be decoded."),
    "KeyTooLongError": (400, "Your key is too long: 1,024 bytes of UTF-8 are the most."),
    "MalformedTrailerError": (400, "The trailer of the body is malformed."),
    "MalformedXML": (400, "The XML you provided was not well-formed or not what is expected."),
    "MaxMessageLengthExceeded": (400, "Your request was too large."),
    "MetadataTooLarge": (400, "Your metadata headers exceed 2 kB."),
    "MethodNotAllowed": (405, "The specified method is not allowed against this resource."),
    "MissingContentLength": (411, "You must provide the Content-Length HTTP header."),
    "NoSuchBucket": (404, "The specified bucket does not exist."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "NoSuchUpload": (404, "The upload does not exist: it was aborted, completed or never begun."),
    "NotImplemented": (501, "This server does not implement what you ask for."),
    "OperationAborted": (409, "The source was replaced while it was copied. Please try again."),
    "PreconditionFailed": (412, "A condition of the request does not hold."),
    "QuotaExceeded": (403, "The access key's quota is used up."),
    "RequestHeaderSectionTooLarge": (400, "Your request header exceeds the maximum size."),
    "RequestTimeout": (400, "Nothing came from you for too long."),
    "RequestTimeTooSkewed": (403, "The request's time and the server's differ by over 15 minutes."),
    "SignatureDoesNotMatch": (403, "The signature we calculated does not match yours."),
    "SlowDown": (503, "Please reduce your request rate."),
    "XAmzContentSHA256Mismatch": (400, "x-amz-content-sha256 does not match what we received."),
}


class S3Error(Exception):
    """One refusal; `headers` go with the answer."""

    def __init__(
        self, code: str, message: str = "", headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self.status, usual = ERRORS[code]
        self.code = code
        self.message = message or usual
        self.headers = headers
        super().__init__(f"{code}: {self.message}")

    def document(self, resource: str, request_id: str) -> bytes:
        """The XML that tells a client; `resource` is the path it asked for."""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message>"
            f"<Resource>{xml_text(resource)}</Resource>"
            f"<RequestId>{request_id}</RequestId></Error>"
        ).encode("utf-8", "replace")


_REFERENCES = {'"': "&quot;"} | {
    chr(code): f"&#x{code:X};" for code in (*range(32), 0x7F, 0xFFFE, 0xFFFF)
}


def xml_text(text: str) -> str:
    """`text` for an XML document.

    What XML 1.0 has no place for becomes a character reference, as AWS writes it; a client that
    lists such keys asks for encoding-type=url.
    """
    return escape(text) if text.isprintable() and '"' not in text else escape(text, _REFERENCES)
