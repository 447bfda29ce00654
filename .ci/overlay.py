"""Lets ``.venv`` see a shared environment's packages and commands: ``python .ci/overlay.py SHARED``."""

import sys
from pathlib import Path


def main(shared: Path, own: Path) -> None:
    """Add the shared site-packages to the path, and its commands with our interpreter in their first line."""
    packages = next(shared.glob("lib/python3.*/site-packages"))
    target = next(own.glob("lib/python3.*/site-packages"))
    (target / "shared.pth").write_text(f"import site; site.addsitedir({str(packages)!r})\n")
    for command in (shared / "bin").iterdir():
        link = own / "bin" / command.name
        if link.exists() or not command.is_file():
            continue
        head, _, body = command.read_bytes().partition(b"\n")
        if head.startswith(b"#!") and str(shared).encode() in head:
            link.write_bytes(b"#!" + str(own.resolve() / "bin" / "python").encode() + b"\n" + body)
            link.chmod(0o755)
        else:
            link.symlink_to(command)


main(Path(sys.argv[1]).resolve(), Path(".venv"))
