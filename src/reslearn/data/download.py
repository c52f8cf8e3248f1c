"""Locates well-known data sets on this machine, or downloads them atomically with checksums."""

import gzip
import hashlib
import http.client
import os
import secrets
import shutil
import ssl
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from reslearn.errors import UserError
from reslearn.files import cache_folder, fsync_file, fsync_folder, user_path


@dataclass(frozen=True)
class RemoteFile:
    """A file to download. checksum: "sha256:HEX" or "md5:HEX". size: exact, in bytes."""

    url: str
    checksum: str
    size: int


@dataclass(frozen=True)
class OfficialSet:
    """A well-known data set.

    folder: the name of its folder. files: file names and unpacked sizes in bytes. sources: downloads. also: further folders to
    look in.
    """

    folder: str
    files: Mapping[str, int]
    sources: tuple[RemoteFile, ...]
    also: tuple[Path, ...] = ()

    def file(self, folder: Path, name: str) -> Path | None:
        """The path of a file in `folder`, unpacked or as .gz, or None if it does not exist."""
        # os.path.isfile, since Path.is_file raises if a parent folder is not accessible.
        return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)  # noqa: PTH113

    def lacks(self, folder: Path) -> list[str]:
        """The files that are not in `folder`."""
        return [name for name in self.files if self.file(folder, name) is None]

    def partly_in(self, folder: Path) -> bool:
        """Whether any of the files is in `folder`."""
        return len(self.lacks(folder)) < len(self.files)


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
# Sizes and checksums are of the files that the authors publish.
OFFICIAL = {
    "fashion-mnist": OfficialSet(
        "fashion-mnist",
        {
            "train-images-idx3-ubyte": 47_040_016,
            "train-labels-idx1-ubyte": 60_008,
            "t10k-images-idx3-ubyte": 7_840_016,
            "t10k-labels-idx1-ubyte": 10_008,
        },
        (
            RemoteFile(f"{_FASHION}/train-images-idx3-ubyte.gz", "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
            RemoteFile(f"{_FASHION}/train-labels-idx1-ubyte.gz", "md5:25c81989df183df01b3e8a0aad5dffbe", 29_515),
            RemoteFile(f"{_FASHION}/t10k-images-idx3-ubyte.gz", "md5:bef4ecab320f06d8554ea6380940ec79", 4_422_102),
            RemoteFile(f"{_FASHION}/t10k-labels-idx1-ubyte.gz", "md5:bb300cfdad3c16e7a12a480ee83cd310", 5_148),
        ),
        also=(Path("/usr/share/datasets/fashion-mnist"),),  # Debian's package dataset-fashion-mnist
    ),
    "cifar10": OfficialSet(
        "cifar-10-batches-bin",
        {f"data_batch_{i}.bin": 10_000 * 3073 for i in range(1, 6)} | {"test_batch.bin": 10_000 * 3073},
        (
            RemoteFile(
                f"{_CIFAR}/cifar-10-binary.tar.gz",
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                170_052_171,
            ),
        ),
    ),
    "cifar100": OfficialSet(
        "cifar-100-binary",
        {"train.bin": 50_000 * 3074, "test.bin": 10_000 * 3074},
        (RemoteFile(f"{_CIFAR}/cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8", 168_513_733),),
    ),
}

TIMEOUT = 30.0
"""Seconds without data after which a download fails."""
_BLOCK = 1 << 20


def _folders(official: OfficialSet) -> list[Path]:
    """The folders to search: $RESLEARN_DATA, the set's own folder in it, the set's folder in the cache, and `official.also`."""
    root = os.environ.get("RESLEARN_DATA")
    configured = [user_path(root), user_path(root) / official.folder] if root else []
    return [*configured, cache_folder() / official.folder, *official.also]


def present(name: str) -> Path | None:
    """The folder on this machine with all files of OFFICIAL[name], or None."""
    return next((folder for folder in _folders(OFFICIAL[name]) if not OFFICIAL[name].lacks(folder)), None)


def locate(name: str) -> Path:
    """Returns the folder with all files of OFFICIAL[name], after downloading them to the cache if necessary.

    Raises UserError with the folders searched and what to do.
    """
    official = OFFICIAL[name]
    if folder := present(name):
        return folder
    try:
        return _download(official, cache_folder())
    except (UserError, OSError) as why:
        folders = ", ".join(f"{path}{' (incomplete)' if official.partly_in(path) else ''}" for path in _folders(official))
        others = f" and the {len(official.sources) - 1} other files beside it" if official.sources[1:] else ""
        raise UserError(
            f"{name} is not in {folders} and cannot be downloaded ({why}): download {official.sources[0].url}{others} manually, "
            f"unpack into {official.folder}/, and set RESLEARN_DATA to the folder that contains it"
        ) from None


def _download(official: OfficialSet, cache: Path) -> Path:
    folder = cache / official.folder
    for source in official.sources:
        name = source.url.rpartition("/")[2]
        if not name.endswith(".tar.gz"):
            fetch(source.url, folder / name, checksum=source.checksum, size=source.size)
            continue
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
            archive = fetch(source.url, Path(scratch) / name, checksum=source.checksum, size=source.size)
            unpack_tar(archive, cache, {f"{official.folder}/{file}": size for file, size in official.files.items()})
    return folder


def fetch(url: str, target: Path, *, checksum: str, size: int) -> Path:
    """Downloads `url` to the file `target` atomically, replacing it, and returns `target`.

    checksum: "sha256:HEX" or "md5:HEX". size: exact, in bytes. Only https is allowed, including redirects; the system's
    certificates and proxy settings (SSL_CERT_FILE, HTTPS_PROXY) apply. Raises UserError with the URL on any failure.
    """
    kind, _, expected = checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    received = 0
    try:
        _require_https(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=ssl.create_default_context()), _HttpsRedirects())
        with opener.open(url, timeout=TIMEOUT) as response, partial.open("xb") as file:
            while block := response.read(_BLOCK):
                received += len(block)
                if received > size:
                    raise UserError(f"{url}: larger than the expected {size:,} bytes: the file has changed")
                digest.update(block)
                file.write(block)
                _show(target.name, received, size)
        fsync_file(partial)
        if received < size:
            raise UserError(f"{url}: connection closed after {received:,} of {size:,} bytes: try again")
        if digest.hexdigest() != expected:
            raise UserError(f"{url}: {kind} is {digest.hexdigest()}, not {expected}: the file has changed")
        partial.replace(target)
        fsync_folder(target.parent)
    except urllib.error.HTTPError as why:
        why.close()
        raise UserError(f"{url}: HTTP error {why.code} {why.reason}") from None
    except (OSError, http.client.HTTPException) as why:
        raise UserError(f"{url}: {getattr(why, 'reason', None) or why or type(why).__name__}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _require_https(newurl)
        except UserError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if urlsplit(url).scheme != "https":
        raise UserError(f"{url}: not https; only https downloads are allowed")


def _show(name: str, received: int, size: int) -> None:
    """Shows progress on one line if stderr is a terminal."""
    if sys.stderr.isatty():
        end = "\n" if received == size else ""
        print(f"\r{name}: {received / 1e6:.0f} of {size / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)


def unpack_tar(archive: Path, target: Path, members: Mapping[str, int]) -> None:
    """Extracts these members (name -> exact size in bytes) of a .tar.gz archive into the folder `target`.

    Ignores all other members, and paths and file types of the archive. Moves the files into place once all are complete.
    Raises UserError if a member is missing, duplicate, not a regular file, or of the wrong size, or if the archive is damaged.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target) as scratch:
            extracted = {name: Path(scratch) / str(i) for i, name in enumerate(members)}
            with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    if member.name not in members:
                        continue
                    path = extracted[member.name]
                    source = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                    if source is None or path.exists():
                        raise UserError(f"{archive}: {member.name} is duplicate or not a regular file: download the archive again")
                    if member.size != members[member.name]:
                        sizes = f"{member.size:,} bytes instead of {members[member.name]:,}"
                        raise UserError(f"{archive}: {member.name} has {sizes}: download the archive again")
                    with path.open("xb") as file:
                        shutil.copyfileobj(source, file, _BLOCK)
                    fsync_file(path)
                while stream.read(_BLOCK):  # gzip's checksum is at the very end
                    pass
            for name, path in extracted.items():
                if not path.exists() or path.stat().st_size != members[name]:
                    raise UserError(f"{archive}: {name} is missing or truncated: download the archive again")
            for name, path in extracted.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(target / name)
                fsync_folder((target / name).parent)
    except (tarfile.TarError, zlib.error, EOFError) as why:
        raise UserError(f"{archive}: damaged ({why}): download the archive again") from None
    except OSError as why:
        raise UserError(f"{archive}: cannot be unpacked to {target}: {why}") from None
