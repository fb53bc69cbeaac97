"""Read the shards of a checkpoint that anyone may have written: no file of it runs code, or leads out of its folder.

`torch.distributed.checkpoint` (DCP) reads two kinds of pickles in full trust: `.metadata`, and each value that is no
tensor. Here the first may name DCP's own classes only, and the second numbers, text and containers of these.
"""

import io
import pickle
from collections.abc import Iterable
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as of_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

CLASSES = (
    of_dcp.Metadata, of_dcp.MetadataIndex, of_dcp.TensorStorageMetadata, of_dcp.BytesStorageMetadata,
    of_dcp.ChunkStorageMetadata, of_dcp.TensorProperties, of_dcp.StorageMeta, of_dcp._MEM_FORMAT_ENCODING, _StorageInfo,
    torch.Size, PosixPath,
)  # fmt: skip
NAMES = {(kind.__module__, kind.__name__) for kind in CLASSES} | {("torch.serialization", "_get_layout")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which DCP does not write")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """Reads the files of one folder, and of these only those that a manifest names."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Read the metadata. Raises ValueError: in one line, that they are not what DCP writes; or OSError."""
        super().__init__(folder)
        path = folder / ".metadata"
        content = path.read_bytes()
        try:
            self.metadata: of_dcp.Metadata = _Unpickler(io.BytesIO(content)).load()
            entries = list(self.metadata.storage_data.values())
            plain = all(type(entry) is _StorageInfo and not entry.transform_descriptors for entry in entries)
            foreign = {entry.relative_path for entry in entries} - set(names)
        except Exception as error:  # whatever a foreign or damaged pickle makes the unpickler raise
            raise ValueError(f"{path} is no metadata of DCP ({error}); use another checkpoint") from None
        if foreign or not plain:
            raise ValueError(f"{path} leads to {sorted(foreign)[:1]}, not in the manifest; use another checkpoint")

    def read_metadata(self, *args: Any, **kwargs: Any) -> of_dcp.Metadata:
        """Return what `__init__` has read, as DCP's own method does."""
        self.metadata.storage_meta = self.metadata.storage_meta or of_dcp.StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class Planner(dcp.DefaultLoadPlanner):
    """DCP's planner; values that are no tensors are read without trust."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one value in its place in the state."""
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                f"{read_item.storage_index.fqn} is no plain value, but a pickle that asks for code"
            ) from None
        trusted = io.BytesIO()  # super() loads with trust what was not code
        torch.save(plain, trusted)
        trusted.seek(0)
        super().load_bytes(read_item, trusted)
