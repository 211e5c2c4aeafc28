import os


def read_to_end(reader: int) -> str:
    """What was written to a pseudo-terminal of which `reader` is the reading end. One read may give a part of it."""
    pieces = []
    try:
        while piece := os.read(reader, 65536):
            pieces.append(piece)
    except OSError:  # Linux' answer once the writing end is closed and nothing is left
        pass
    os.close(reader)
    return b"".join(pieces).decode()
