"""Requests to an S3-compatible store: each is timed, repeated and judged here; botocore signs and sends them.

What may be repeated is repeated with growing random pauses until a deadline, since a store may be gone for a while;
what will not get better by waiting (credentials, a missing bucket, a request that it does not serve) fails at once.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from ckpt.backends.base import Buffer
from ckpt.errors import CkptError, ConflictError, NotFoundError, StorageError, UsageError

__all__ = ["Client", "Unserved", "client_for", "skew"]

PATIENCE = 120.0
"""Seconds for which a request is repeated: longer than a gateway takes to restart."""

_PAUSES = (0.05, 8.0)
_PIECE = 1 << 20
_SKEW = 5.0  # an answer tells whole seconds, and takes a while
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60}
_AGAIN = frozenset(
    [
        "InternalError",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "RequestTimeout",
        "RequestLimitExceeded",
        "TooManyRequests",
        "BandwidthLimitExceeded",
        "OperationAborted",
        "ConditionalRequestConflict",
        "XAmzContentSHA256Mismatch",
        "BadDigest",
    ]
)
_REFUSED = {
    "InvalidAccessKeyId": "it does not know the access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; get new ones and start again",
    "TokenRefreshRequired": "the credentials have expired; get new ones and start again",
    "InvalidToken": "the session token is not valid; get new credentials",
    "RequestTimeTooSkewed": "the clock of this host is wrong; set it",
    "AccountProblem": "the account has a problem; ask its owner",
}
_DENIED = (
    "these credentials are wrong or not enough; they must allow to get, put, delete and list objects, and to list and "
    "abort uploads"
)


class Unserved(StorageError):
    """The store does not serve this kind of request at all."""


class Client:
    """Of one endpoint and one set of credentials; shared by the threads of a process.

    options  as s3fs takes them: key, secret, token, profile, endpoint_url, anon, client_kwargs (region_name, verify);
             what they leave open comes from where all AWS tools find it
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            import botocore.config
            import botocore.session
            from botocore import UNSIGNED
        except ImportError:
            raise UsageError("s3:// needs botocore; pip install 'ckpt-universal[s3]'") from None
        more = dict(options.get("client_kwargs") or {})
        config: dict[str, Any] = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
            "request_checksum_calculation": "when_required",  # other stores ignore or refuse them; ours are checked
            "response_checksum_validation": "when_required",
            "s3": {"payload_signing_enabled": True},  # the one checksum of a request that every store checks
            "tcp_keepalive": True,
            **_TIMEOUTS,
        }
        if options.get("anon"):
            config["signature_version"] = UNSIGNED
        try:
            session = botocore.session.Session(profile=options.get("profile"))
            region = more.get("region_name") or session.get_config_variable("region") or "us-east-1"
            self._client = session.create_client(
                "s3",
                region_name=region,
                endpoint_url=options.get("endpoint_url") or more.get("endpoint_url"),
                verify=more.get("verify"),
                aws_access_key_id=options.get("key"),
                aws_secret_access_key=options.get("secret"),
                aws_session_token=options.get("token"),
                config=botocore.config.Config(**config),
            )
        except Exception as e:
            raise UsageError(f"s3://: {type(e).__name__}: {e}; check the AWS_ variables and ~/.aws") from None
        self.patience = PATIENCE
        self.exclusive: dict[str, bool] = {}
        """Bucket -> whether its store keeps to create-only-if-absent, once that was tried."""

    def call(
        self,
        operation: str,
        bucket: str,
        key: str,
        *,
        patience: float | None = None,
        body: Buffer | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """One request, repeated while that may help. `body`: sent from where it lies.

        Raises NotFoundError (no object, no bucket), ConflictError (a condition was not met), Unserved, StorageError.
        """
        tries = _Tries(operation, f"s3://{bucket}/{key}", self.patience if patience is None else patience)
        while True:
            sent = {"Bucket": bucket, **({} if "Prefix" in more or not key else {"Key": key}), **more}
            if body is not None:
                sent["Body"] = _Body(body)
            try:
                answer: dict[str, Any] = getattr(self._client, operation)(**sent)
                return answer
            except Exception as e:  # botocore's errors and those it lets through have no family in common
                tries.failed(e)

    def read(self, bucket: str, key: str, offset: int, into: Sequence[Buffer]) -> int:
        """Fills the buffers, one after the other, from `offset` on, with one request; returns how many bytes there were before
        the object's end."""
        tries, at = _Tries("get_object", f"s3://{bucket}/{key}", self.patience), 0
        left = deque(b for b in into if len(b))
        size = sum(map(len, left))
        while at < size:
            try:
                asked = f"bytes={offset + at}-{offset + size - 1}"
                answer = self._client.get_object(Bucket=bucket, Key=key, Range=asked)
                if offset + at and "ContentRange" not in answer:
                    raise Unserved(f"s3://{bucket}/{key}: the store does not serve ranges of objects")
                stop = at + min(int(answer["ContentLength"]), size - at)
                with answer["Body"] as stream:
                    while at < stop:
                        n = stream.readinto(left[0][: min(_PIECE, stop - at)])
                        if not n:
                            raise ConnectionResetError("the answer ended early")
                        at, left[0] = at + n, left[0][n:]
                        if not len(left[0]):
                            left.popleft()
                return at
            except Exception as e:
                if _code(e)[0] in ("InvalidRange", "416"):
                    return at
                tries.failed(e)
        return at

    def fetch(self, bucket: str, key: str, limit: int) -> bytes | None:
        """A whole object; None if it is larger than `limit` bytes."""
        tries = _Tries("get_object", f"s3://{bucket}/{key}", self.patience)
        while True:
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key)
                with answer["Body"] as stream:
                    return None if int(answer["ContentLength"]) > limit else bytes(stream.read())
            except Exception as e:
                tries.failed(e)


class _Tries:
    """The tries of one request."""

    def __init__(self, operation: str, where: str, patience: float) -> None:
        self._what, self._where = operation, where
        self._deadline, self._patience = time.monotonic() + patience, patience
        self._count = 0

    def failed(self, e: Exception) -> None:
        """Judges an error: returns, after a pause, if the request is to be repeated; else raises one of ours."""
        if isinstance(e, CkptError):
            raise e
        name = type(e).__name__
        code, status = _code(e)
        if code:
            self._judge(code, status)
        elif name in (
            "NoCredentialsError",
            "PartialCredentialsError",
            "CredentialRetrievalError",
            "TokenRetrievalError",
        ):
            text = (
                "no credentials were found, or not all; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
            raise StorageError(f"{self._where}: {text}") from None
        elif name in ("ParamValidationError", "SSLError", "ProxyConnectionError") or isinstance(
            e, (TypeError, ValueError)
        ):
            raise StorageError(f"{self._where}: {self._what}: {name}: {str(e)[:300]}") from None
        self._count += 1
        low, high = _PAUSES
        pause = random.uniform(low, min(high, low * 2**self._count))
        if time.monotonic() + pause > self._deadline:
            said = f"{status} {code}" if code else f"{name}: {str(e)[:300]}"
            raise StorageError(
                f"{self._where}: {self._what} failed {self._count} times in {self._patience:.0f} s, the last time with "
                f"{said}; check that the store is up and AWS_ENDPOINT_URL is right, then try again"
            ) from None
        time.sleep(pause)

    def _judge(self, code: str, status: int) -> None:
        """Raises for answers of the store that stay what they are."""
        if code in ("PreconditionFailed", "412") or (status == 412):
            raise ConflictError(f"{self._where}: exists already") from None
        if code == "NoSuchBucket":
            bucket = self._where.split("/")[2]
            raise NotFoundError(f"{self._where}: there is no bucket {bucket!r}; create it, or check the name") from None
        if code in _AGAIN or status in (408, 429, 500, 502, 503, 504):
            return
        if status == 501 or code == "NotImplemented":
            raise Unserved(f"{self._where}: the store does not serve {self._what} in this form") from None
        if status == 404:
            raise NotFoundError(f"{self._where}: does not exist") from None
        if code in _REFUSED or status in (401, 403):
            raise StorageError(
                f"{self._where}: {self._what} was refused ({code}): {_REFUSED.get(code, _DENIED)}"
            ) from None
        raise StorageError(f"{self._where}: {self._what} was refused with {status} {code}") from None


def _code(e: Exception) -> tuple[str, int]:
    """(error code, HTTP status) of a store's answer; ("", 0) for any other error."""
    answer = getattr(e, "response", None)
    if not isinstance(answer, dict) or "Error" not in answer:
        return "", 0
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(answer["Error"].get("Code", "")) or str(status), int(status)


def skew(answer: Mapping[str, Any]) -> float:
    """Seconds by which this host's clock is ahead of the store's, as told by one of its answers, if they are many."""
    try:
        told = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0
    ahead = time.time() - told
    return ahead if abs(ahead) > _SKEW else 0.0


class _Body:
    """Bytes to send, where they lie: what signs asks for little pieces, what sends gets large ones."""

    def __init__(self, data: Buffer) -> None:
        self._data, self._at = data, 0

    def __len__(self) -> int:
        return len(self._data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def read(self, n: int = -1) -> Buffer:
        n = len(self._data) if n is None or n < 0 else max(n, _PIECE)
        data = self._data[self._at : self._at + n]
        self._at += len(data)
        return data

    def readinto(self, into: Buffer) -> int:
        data = self._data[self._at : self._at + len(into)]
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


_clients: dict[str, Client] = {}
_lock = threading.Lock()


def client_for(options: Mapping[str, Any]) -> Client:
    """The process's client for these options and the environment as it is now."""
    env = sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_") or k == "HOME")
    key = hashlib.sha256(repr((os.getpid(), sorted(options.items(), key=str), env)).encode()).hexdigest()
    with _lock:
        if key not in _clients:
            _clients[key] = Client(options)
        return _clients[key]
