"""Data: listing of folders, decoding of files, transforms of pixels."""

from regraft.data.decoding.files import Unreadable
from regraft.data.folders import Listing, Sample, list_data
from regraft.data.photos import Photos, loader, read_photos

__all__ = ["Listing", "Photos", "Sample", "Unreadable", "list_data", "loader", "read_photos"]
