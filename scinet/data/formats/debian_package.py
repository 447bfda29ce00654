"""The files of a Debian package, out of its tree as ``dpkg -x`` leaves it or out of the ``.deb`` itself."""

from __future__ import annotations

import lzma
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scinet.data.records import ImageSource, check_folder, file_source
from scinet.errors import DataError

_MAGIC, _HEADER = b"!<arch>\n", 60
_MEMBER = "data.tar.xz"
_MAX_UNPACKED_RATIO = 50  # images hardly compress: a package that grows more is a bomb


class Entry(NamedTuple):
    """A file, or a link (``target``) to another name; both names are below the folder that was asked for."""

    name: str
    source: ImageSource | None
    target: str


def entries(root: Path, package: str, folder: str, scratch: Path) -> list[Entry]:
    """Return the files and links below a folder of a package, by name.

    Args:
        root: the user's folder: it holds the package's tree, or the ``.deb``.
        package: its name.
        folder: where it installs them, for instance ``usr/share/openclipart/png``.
        scratch: where a ``.deb`` is unpacked to a plain tar, which can be read at random.

    Raises:
        ConfigError: if the user's folder does not exist.
        DataError: if it holds neither, or a package that is damaged or packed in another way.
    """
    check_folder(root, "source folder")
    for tree in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        if (tree / folder).is_dir():
            return sorted(_in_tree(tree / folder))
    packages = sorted(root.glob(f"{package}_*.deb"))
    if not packages:
        raise DataError(
            f"{package} is missing in {root}: expected {package}_*.deb there, or its tree with {folder}; "
            f"`apt-get download {package}` gets it, without root"
        )
    return sorted(_in_tar(_plain_tar(packages[-1], scratch), folder))


def _in_tree(folder: Path) -> Iterator[Entry]:
    for directory, _, files in os.walk(folder):
        for file in files:
            path = Path(directory, file)
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                yield Entry(name, None, _target(name, os.readlink(path)))
            elif path.is_file():
                yield Entry(name, file_source(str(path), path.stat()), "")


def _in_tar(tar: Path, folder: str) -> Iterator[Entry]:
    changed = tar.stat().st_mtime_ns
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                name = posixpath.normpath(info.name)
                if not name.startswith(f"{folder}/"):
                    continue
                name = name.removeprefix(f"{folder}/")
                if info.issym():
                    yield Entry(name, None, _target(name, info.linkname))
                elif info.isreg() and not info.issparse():
                    source = ImageSource(str(tar), info.name, info.offset_data, info.size, info.size, "", changed)
                    yield Entry(name, source, "")
    except tarfile.TarError as error:
        raise DataError(f"{tar} cannot be read: {error}; download the package again") from error


def _target(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _plain_tar(package: Path, scratch: Path) -> Path:
    """Return the files of a package as a plain tar in the scratch folder."""
    changed = package.stat().st_mtime_ns
    target = scratch / f"{package.stem}-{changed}.tar"
    if target.is_file():
        return target
    temporary = target.with_name(f"{target.name}.part")
    try:
        with package.open("rb") as file, temporary.open("wb") as plain:
            size = _find_data(file, package)
            inflate, left, written = lzma.LZMADecompressor(lzma.FORMAT_XZ), size, 0
            while left:
                packed = file.read(min(left, 2**20))
                if not packed:
                    raise EOFError("it ends early")
                left -= len(packed)
                content = inflate.decompress(packed)
                written += plain.write(content)
                if written > _MAX_UNPACKED_RATIO * size:
                    raise DataError(f"{package} unpacks {size} bytes to more than {written}: a decompression bomb")
            if not inflate.eof:
                raise EOFError("it ends early")
        os.utime(temporary, ns=(changed, changed))
        temporary.rename(target)
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"package {package} cannot be read: {error}; download it again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _find_data(file: BinaryIO, package: Path) -> int:
    """Go to the beginning of a package's data, and return its length (deb(5): an ar archive)."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise DataError(f"{package} is no Debian package")
    while len(header := file.read(_HEADER)) == _HEADER and header[48:58].strip().isdigit():
        name, size = header[:16].decode("ascii", "replace").strip().removesuffix("/"), int(header[48:58])
        if name == _MEMBER:
            return size
        file.seek(size + size % 2, os.SEEK_CUR)
    raise DataError(
        f"{package} holds no {_MEMBER}: unpack it with `dpkg -x {package.name} FOLDER`, and give the folder"
    )
