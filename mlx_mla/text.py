"""Text from outside: bytes that must be UTF-8, and characters that UTF-8 has."""

from mlx_mla.errors import UserError


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text, without the mark that some editors put in front; UserError says where it is
    none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where} is not text in UTF-8 (byte {data[e.start]:#04x} at {e.start}); encode it anew"
        ) from None


def encodable(text: str) -> bool:
    """Whether a text is one: JSON's escapes also spell halves of characters (surrogates), which no
    encoding has."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
