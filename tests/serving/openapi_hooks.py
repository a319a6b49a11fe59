"""What schemathesis must know of the server beside its description."""

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    """JSON lines, or what else was made up, as it is."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
