"""What may pass between a client, the gateway and an upstream in the transmission phase.

Written from proto.md and the project's own rules, without the gateway's codecs: a book of the
client's requests and of what the upstream was sent for them, and a reader for each stream.
"""
