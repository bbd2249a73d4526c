"""Text that was decoded as what it is not ("schÃ¶n"), mended by ftfy."""

from mlm_jax.data.document import Rule
from mlm_jax.data.rules.basic import not_installed, rewrite


def mend() -> Rule:
    """Mends wrong encodings and HTML entities, and leaves alone what is right.

    The settings are those of datatrove's FTFYFormatter: curly quotes, ligatures and wide characters stay. Control characters are left to the
    rule that has their name.
    """
    try:
        import ftfy
    except ImportError as e:
        raise not_installed("data.clean.mojibake", True, e) from e
    settings = ftfy.TextFixerConfig(
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return rewrite("mojibake", lambda text: ftfy.fix_text(text, settings))
