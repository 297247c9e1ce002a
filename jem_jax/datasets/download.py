"""Archives on disk, fetched from their address or by hand. Size and SHA-256 are checked before use.

A download is written to a `.partial` file, which is renamed once it is whole and right. An interrupted download goes on
there.
"""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from jem_jax.common import files
from jem_jax.common.errors import UserError, first_line
from jem_jax.datasets.notices import say
from jem_jax.datasets.sources import Archive, Source

_CHUNK = 1 << 20
_STALLED_SECONDS = 60


def obtain(source: Source, folder: Path, manual_dir: Path | None) -> list[Path]:
    """Paths of a source's archives, in its order. Size and SHA-256 of each are right.

    Args:
      folder: for downloads.
      manual_dir: a folder of archives fetched by hand, under their plain names, there or in a subfolder of the
        source's name. If given, nothing is fetched.

    Raises:
      UserError: in one line, which archive is missing, damaged or out of reach, and what to do.
    """
    if manual_dir is not None:
        return [_by_hand(archive, source, manual_dir) for archive in source.archives]
    return [fetch(archive, folder / archive.name) for archive in source.archives]


def fetch(archive: Archive, path: Path) -> Path:
    """Downloads an archive to `path`, unless it is there already, and returns `path`.

    Raises:
      UserError: in one line, what happened and what to do.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if path.exists() and fault(path, archive) is None:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(archive, partial)
        partial.replace(path)
    except _FailedError as error:
        raise UserError(
            f"{archive.address} could not be fetched to {path}: {error}. Try again, or fetch it by hand and pass "
            "--config.data.manual_dir=DIR, the folder that it is in"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; name another place with --config.data.data_dir=DIR"
        ) from error
    return path


def fault(path: Path, archive: Archive) -> str | None:
    """The fault of a file, or None if it is the archive."""
    size = path.stat().st_size
    if size != archive.size:
        return f"it has {size:,} bytes instead of {archive.size:,}"
    digest = files.sha256(path)
    if digest != archive.sha256:
        return f"its SHA-256 is {digest[:12]}… instead of {archive.sha256[:12]}…"
    return None


def _by_hand(archive: Archive, source: Source, manual_dir: Path) -> Path:
    places = [manual_dir / source.name / archive.name, manual_dir / archive.name]
    path = next((candidate for candidate in places if candidate.is_file()), None)
    if path is None:
        raise UserError(
            f"config.data.manual_dir {manual_dir} holds no {archive.name}, which {source.name} needs; "
            f"fetch it from {archive.address}"
        )
    wrong = fault(path, archive)
    if wrong:
        raise UserError(f"{path} is not the {archive.name} of {source.name}: {wrong}; fetch it from {archive.address}")
    return path


class _FailedError(Exception):
    """The reason why a download failed; `fetch` adds the place and the way out."""


def _download(archive: Archive, partial: Path) -> None:
    """Downloads the rest of an archive to a file.

    Raises:
      _FailedError: the server sent another file, which was deleted; or only a part, which is kept.
      OSError: the file cannot be written.
    """
    start = partial.stat().st_size if partial.exists() else 0
    if start >= archive.size:
        start = 0
    with _open(archive, partial, start) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and start + int(declared) != archive.size:
            partial.unlink(missing_ok=True)
            raise _FailedError(f"it has {start + int(declared):,} bytes there instead of {archive.size:,}")
        say(f"fetching {archive.address} ({_megabytes(archive.size)}) to {partial.parent}")
        lost = _receive(response, archive, partial, start)
    size = partial.stat().st_size
    if size < archive.size:
        raise _FailedError(
            f"{lost} after {size:,} of {archive.size:,} bytes, kept in {partial}, where the next try goes on"
        )
    wrong = fault(partial, archive)
    if wrong:
        partial.unlink()
        raise _FailedError(f"what came is not the file expected and was deleted, {wrong}")


def _open(archive: Archive, partial: Path, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "jem_jax"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(archive.address, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=_STALLED_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink(missing_ok=True)
        raise _FailedError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or reason
        raise _FailedError(f"this machine is offline or cannot reach {request.host} ({text})") from error


def _receive(response: http.client.HTTPResponse, archive: Archive, partial: Path, start: int) -> str:
    """Writes a server's response to a file, from `start` on, and returns how it ended."""
    # One byte more than the archive has is enough to know that it is the wrong file.
    left = archive.size + 1 - start
    bar = tqdm(
        total=archive.size, initial=start, desc=archive.name, unit="B", unit_scale=True, disable=None, leave=False
    )
    with partial.open("ab" if start else "wb") as file, bar:
        while left > 0:
            try:
                # read() would lose the bytes before a stall.
                chunk = response.read1(min(_CHUNK, left))
            except (OSError, http.client.HTTPException) as error:
                return f"the connection was lost ({first_line(error)})"
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
            left -= len(chunk)
    return "the connection was closed"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes"
