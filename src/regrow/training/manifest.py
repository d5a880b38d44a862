"""What a checkpoint consists of: its files with their sizes and checksums, written last.

``manifest.json`` maps each other file of the folder to ``{"bytes": ..., "blake2b": ...}``. A folder is intact if every
file is there and is what the manifest says. It tells accidents (a disk that filled up, a copy that stopped, a bit that
flipped), not attacks: whoever can write the files can write the manifest too, so what is read is validated all the
same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe the files that are in a folder now."""
    files = {path.name: _described(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE}
    (folder / MANIFEST_FILE).write_text(json.dumps(files, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, as ``model.safetensors is damaged (...)``; ``None`` if it is intact.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "numbers.txt").write_text("1 2 3")
        >>> write_manifest(folder)
        >>> damage(folder)
        >>> _ = (folder / "numbers.txt").write_text("1 2")
        >>> damage(folder)
        'numbers.txt is damaged (3 bytes, 5 were written)'
    """
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())
        expected = {str(name): (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is damaged (missing)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        return f"{MANIFEST_FILE} is damaged ({error})"
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name, (size, checksum) in expected.items():
        path = folder / name
        if name not in present:
            return f"{name} is damaged (missing)"
        found = path.stat().st_size
        if found != size:
            return f"{name} is damaged ({found} bytes, {size} were written)"
        if _described(path)["blake2b"] != checksum:
            return f"{name} is damaged (its checksum is not the one that was written)"
    return None


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}
