"""Text from outside: bytes that must be UTF-8, and characters that UTF-8 has."""

from mlx_mla.errors import UserError


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 bytes as text, without the byte-order mark that some editors put in front.

    Args:
        where: Name of their source, for messages.
        offset: How many bytes of the source are before these.

    Raises:
        UserError: Naming the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as e:
        at = offset + len(data) - len(e.object) + e.start  # the mark is not in `e.object`
        raise UserError(
            f"{where}: not UTF-8 text (byte {e.object[e.start]:#04x} at offset {at:,}); "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from None


def encodable(text: str) -> bool:
    """Whether a text is one: JSON's escapes also spell halves of characters (surrogates), which no
    encoding has."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
