"""Which files no person has put into a folder of photos."""

# Files of Windows, macOS, Synology and ext4; names in lower case.
# fmt: off
SYSTEM_FILES = frozenset((
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "$recycle.bin",
    "system volume information", "lost+found",
))
# fmt: on


def is_ignored(name: str) -> bool:
    """Return whether a file or folder is hidden or a system file."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES
