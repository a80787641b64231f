"""zstd in bounded memory, whole frames only."""

from collections.abc import Iterator
from typing import IO

import zstandard


def zstd_chunks(stream: IO[bytes], *, read_bytes: int) -> Iterator[bytes]:
    """The frames of a file, decompressed; none of the chunks is empty.

    All that is in `read_bytes` of the file comes out at once, and 4 bytes may hold 128 KiB: few, where bombs may come.
    Raises ZstdError for damage, and EOFError where the last frame has no end, which zstandard's stream_reader takes for
    a good one.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    at_frame_end = False
    while data := stream.read(read_bytes):
        while data:
            if chunk := frame.decompress(data):
                yield chunk
            at_frame_end = frame.eof
            data = frame.unused_data if at_frame_end else b""
            if at_frame_end:
                frame = decompressor.decompressobj()
    if not at_frame_end:
        raise EOFError("the last zstd frame has no end")
