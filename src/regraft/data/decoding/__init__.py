"""Image files → decoded pixels, by three engines behind `files.decode` and `files.decode_all`.

`native` is a C++ decoder in threads, without the interpreter's lock; `nvjpeg` decodes batches on a GPU; `pillow` is the
reference, and reads whatever the others leave. Which file is whose is decided file by file.
"""
