"""A checkpoint that is opened once: its header is parsed once, and its tensors are read from the same open files.

Header and tensors therefore belong together even if another process saves a checkpoint under the same name meanwhile:
saving renames a new file into place, and the old one stays readable for as long as it is open.
"""

from functools import cached_property
from io import FileIO
from pathlib import Path
from types import TracebackType

from regraft.checkpoint.file.format import KEY, Header, header_in, is_index, is_own, locate, read_index
from regraft.checkpoint.file.layout import TensorEntry, damaged_error, layout_of, open_file, read_start
from regraft.checkpoint.file.shards import weight_map_in
from regraft.errors import CheckpointError

Entries = dict[str, tuple[Path, TensorEntry]]


class OpenCheckpoint:
    """One checkpoint of one file or several; a context manager that closes its files.

    Attributes:
        path: The file, or the index.
        header: What regraft wrote into it; None for a file of other tools.

    Args:
        path: As `load` takes it.

    Raises:
        CheckpointError: There is no such file, it is no checkpoint, or its header cannot be understood.
    """

    def __init__(self, path: Path) -> None:
        self.path = locate(path)
        self._files: dict[Path, FileIO] = {}
        try:
            if is_index(self.path):
                self._content, self._start = read_index(self.path), 0
            else:
                self._content, self._start = read_start(self.path, self.file(self.path))
            metadata = self._content.get("metadata" if is_index(self.path) else "__metadata__")
            self.header: Header | None = header_in(self.path, metadata[KEY]) if is_own(metadata) else None
        except BaseException:
            self.close()
            raise

    def file(self, path: Path) -> FileIO:
        """Return a file of the checkpoint, which is opened at its first use."""
        if path not in self._files:
            self._files[path] = open_file(path)
        return self._files[path]

    @cached_property
    def entries(self) -> Entries:
        """Name → (file, entry in it) for each tensor; no byte of a tensor is read.

        Raises:
            CheckpointError: A file is missing or damaged, or an index does not fit its files.
        """
        if not is_index(self.path):
            layout = layout_of(self.path, self.file(self.path), self._content, self._start)
            return {name: (self.path, entry) for name, entry in layout.items()}
        weight_map, layouts = self._layouts()
        stored = {name: file for file, entries in layouts.items() for name in entries}
        for name in [*weight_map, *stored]:
            if stored.get(name) != weight_map.get(name) or sum(name in entries for entries in layouts.values()) != 1:
                raise damaged_error(self.path, f"'{name}' is not where it says")
        return {name: (file, layouts[file][name]) for name, file in weight_map.items()}

    def _layouts(self) -> tuple[dict[str, Path], dict[Path, dict[str, TensorEntry]]]:
        """Read which file holds each tensor, and what each file holds."""
        weight_map = weight_map_in(self.path, self._content)
        while True:
            try:
                return weight_map, {file: self._layout(file) for file in dict.fromkeys(weight_map.values())}
            except CheckpointError:
                self.close()
                before, weight_map = weight_map, weight_map_in(self.path, read_index(self.path))
                if weight_map == before:
                    raise  # a changed index means that another checkpoint was saved meanwhile: read that one

    def _layout(self, shard: Path) -> dict[str, TensorEntry]:
        file = self.file(shard)
        return layout_of(shard, file, *read_start(shard, file))

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "OpenCheckpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
