"""What differs between the versions of transformers that the package runs on, 4.57 to 5.x, in one place."""


def query_rows(kv_length, kv_offset, query):
    """Where the queries of a mask stand, from the keywords that transformers gives its mask functions.

    Args:
        kv_length, kv_offset: the keys: how many, and the position of the first.
        query: the rest: q_length, q_offset and device from transformers 5.4 on, cache_position [Tq] before.
    Returns:
        (number of queries, device, whether they are all the keys, from position 0 on).
    """
    position = query.get("cache_position")
    if position is not None:
        # as many queries as keys leave room for no earlier one; to read the offset would wait for the device
        return position.shape[0], position.device, kv_offset == 0 and position.shape[0] == kv_length
    length, offset = query["q_length"], query.get("q_offset", 0)
    return length, query.get("device", "cpu"), isinstance(offset, int) and offset == 0 and length == kv_length
