"""The NBD protocol without I/O: bytes in, bytes and decisions out.

Nothing here knows of trio, sockets, TLS or time. Section names in the docstrings are those of the
specification, `doc/proto.md` of the NBD project.
"""
