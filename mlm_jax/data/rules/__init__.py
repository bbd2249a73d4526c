"""The rules of cleaning: each is one step from a document to the same, to a changed one, or to the reason why it is dropped."""

from mlm_jax.config import CleanConfig
from mlm_jax.data.document import Rule
from mlm_jax.data.rules import basic, filters, html, language, mojibake, overlap, pii, urls


def rules(config: CleanConfig) -> list[Rule]:
    """The rules that `config` asks for, in the order in which they are applied.

    What is cheap, or has to see the text as it came, comes first. A rule may stand there twice: its name says what it does. What a rule does
    with a document depends on the document and `config` alone.

    Raises:
      InputError: a file that `config` names is of no use, or a package that it needs is not installed.
    """
    chain = [urls.blocked(config.blocked_urls)] if config.blocked_urls else []
    # Text that was decoded as what it is not is full of C1 control characters, which tell how to mend it.
    chain += [basic.binary(c1=not config.mojibake), html.main_text(every=config.html)]
    if config.mojibake:
        chain += [mojibake.mend(), basic.binary(c1=True)]
    chain += [basic.NEWLINES, basic.CONTROL_CHARACTERS, basic.NFC, basic.EMPTY]
    if config.languages:
        chain.append(language.only(config.languages, config.language_threshold))
    chain += [filters.quality(name) for name in config.filters]
    if config.pii != "keep":
        chain.append(pii.personal_data(config.pii, config.pii_kinds))
    if config.evaluation_sets:
        chain.append(overlap.decontaminate(config.evaluation_sets, config.overlap_words))
    return [*chain, basic.EMPTY]
