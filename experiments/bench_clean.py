"""How much of what the rules of cleaning are after do they find, how much else do they hit, and how fast are they?

Run      python -m experiments.bench_clean [--text PAGES.jsonl.gz] [--documents 200] [--seed 0]
Work     a corpus made from a seed: personal data of every kind and form among numbers that look like it, passages of evaluation sets whole, with
         other capitals, with other punctuation and by half among near misses, texts in other languages, mojibake, pages of HTML with
         boilerplate, and near copies. Precision: of what was found, the share that was planted; recall: of what was planted, the share that was
         found; a place counts where both ends are right. Then MB/s of each rule on one core, over --text or made text
Result   see README.md
"""

import argparse
import collections
import dataclasses
import json
import random
import re
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlm_jax.config import FILTERS, PII_KINDS, CleanConfig, DataConfig, SourceConfig
from mlm_jax.data import prepare, sources
from mlm_jax.data.document import Document, Dropped, Rule
from mlm_jax.data.rules import filters, html, language, mojibake, overlap, pii, rules
from mlm_jax.data.tokens import open_tokens


class Score(NamedTuple):
    """Counts of one kind."""

    planted: int
    found: int
    right: int  # planted and found

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        return self.right / self.planted if self.planted else float("nan")


# --- prose ------------------------------------------------------------------------------------------------------------------------------------

_ADJECTIVES = (
    "old young quiet broken narrow famous wooden early heavy distant careful friendly ancient modern hidden golden simple curious patient "
    "northern southern empty crowded useful strange bright gentle rapid honest local"
).split()
_NOUNS = (
    "teacher farmer bridge letter garden harbour engine story valley museum river council student brother village journey report window market "
    "forest painter island captain station kitchen library doctor mountain festival building machine family winter summer song picture road tower "
    "neighbour visitor company field"
).split()
_VERBS = (
    "described repaired remembered explained visited painted compared measured discovered defended followed admired avoided changed opened "
    "crossed counted studied missed found"
).split()
_FRAMES = (
    "The {a} {n} {v} the {a} {n} of the {n} near a {a} {n}, and nobody {v} it.",
    "After the {n} had {v} a {a} {n}, the {n} and the {a} {n} {v} each other.",
    "A {a} {n} with a {a} {n} is what the {n} {v} when they {v} the {n}.",
    "Many have {v} that {a} {n}, but the {n} {v} it to the {a} {n} in the {n}.",
)

OTHERS = {
    "de": "Die Stadt liegt an einem breiten Fluss und hat eine lange Geschichte. Viele Besucher kommen im Sommer, um die alten Häuser zu sehen. "
    "Der Marktplatz wurde vor einigen Jahren erneuert, weil das Pflaster beschädigt war. Am Abend sitzen die Leute gern draußen und erzählen.",
    "fr": "La ville se trouve au bord d'une large rivière et possède une longue histoire. De nombreux visiteurs viennent en été pour voir les "
    "vieilles maisons. La place du marché a été rénovée il y a quelques années, parce que les pavés étaient abîmés. Le soir, on s'y retrouve.",
    "es": "La ciudad está situada junto a un río ancho y tiene una larga historia. Muchos visitantes llegan en verano para ver las casas antiguas. "
    "La plaza del mercado fue renovada hace algunos años porque el suelo estaba dañado. Por la noche la gente se sienta a conversar.",
    "it": "La città si trova sulle rive di un grande fiume e ha una lunga storia. Molti visitatori arrivano d'estate per vedere le vecchie case. "
    "La piazza del mercato è stata rinnovata qualche anno fa perché la pavimentazione era rovinata. La sera ci si ritrova così a parlare.",
    "pl": "Miasto leży nad szeroką rzeką i ma długą historię. Wielu gości przyjeżdża latem, żeby zobaczyć stare domy. Rynek został odnowiony "
    "kilka lat temu, ponieważ bruk był zniszczony. Wieczorem ludzie chętnie siedzą na zewnątrz i opowiadają sobie różne historie.",
    "ru": "Город стоит на берегу широкой реки и имеет долгую историю. Летом сюда приезжает много гостей, чтобы увидеть старые дома. Рыночную "
    "площадь обновили несколько лет назад, потому что мостовая была повреждена. Вечером люди любят сидеть на улице и разговаривать.",
    "pt": "A cidade fica junto a um rio largo e tem uma longa história. Muitos visitantes chegam no verão para ver as casas antigas. A praça do "
    "mercado foi renovada há alguns anos, porque o chão estava danificado. À noite as pessoas gostam de se sentar lá fora a conversar.",
    "ja": "その町は広い川のほとりにあり、長い歴史を持っています。"
    "夏には古い家並みを見るために多くの人が訪れます。市場の広場は数年前に改修されました。",
}


def sentence(draw: random.Random) -> str:
    """One of very many English sentences, of which two seldom share five words in a row."""
    words = {"{a}": _ADJECTIVES, "{n}": _NOUNS, "{v}": _VERBS}
    return re.sub(r"\{.\}", lambda slot: draw.choice(words[slot[0]]), draw.choice(_FRAMES))


def prose(draw: random.Random, n: int) -> str:
    """`n` different English sentences in paragraphs."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[sentence(draw)] = None
    sentences = list(found)
    return "\n".join(" ".join(sentences[i : i + 4]) for i in range(0, n, 4))


# --- personal data ----------------------------------------------------------------------------------------------------------------------------


def _number(draw: random.Random, pattern: str) -> str:
    """The pattern with a digit for each #, and one from 2 to 9 for each N."""
    return "".join(str(draw.randrange(10)) if c == "#" else str(draw.randrange(2, 10)) if c == "N" else c for c in pattern)


def _luhn_digit(digits: str) -> str:
    return next(d for d in string.digits if sum(int(c) for i, x in enumerate(reversed(digits + d)) for c in str(int(x) * (1 + i % 2))) % 10 == 0)


def _grouped(draw: random.Random, text: str, sizes: tuple[int, ...], gaps: str = " -") -> str:
    """The text as it is, or in groups; the last size counts for all that is left."""
    if draw.random() < 0.4:
        return text
    groups = []
    for size in sizes:
        groups, text = [*groups, text[:size]], text[size:]
    return draw.choice(gaps).join(group for group in [*groups, text] if group)


def _email(draw: random.Random) -> str:
    names = "anna ben carla.diaz d_evans eva-maria f.green+news mueller90 o.brien".split()
    hosts = "mail.com corp-example.org uni-bonn.de post.co.uk inbox.example.net xn--bcher-kva.de team.dev firma.museum".split()
    return f"{draw.choice(names)}@{draw.choice(hosts)}"


def _ip(draw: random.Random) -> str:
    if draw.random() < 0.3:
        tail = [f"{draw.randrange(1, 65536):x}" for _ in range(draw.choice((2, 7)))]
        return "2a03:" + (":".join(tail) if len(tail) == 7 else f"{tail[0]}::{tail[1]}")
    return f"{draw.choice((5, 8, 23, 45, 81, 93, 142, 185, 217))}.{draw.randrange(256)}.{draw.randrange(256)}.{draw.randrange(1, 255)}"


def _american(draw: random.Random) -> str:
    area, office = (f"{draw.randrange(2, 10)}{draw.choice('02345')}{draw.randrange(2, 10)}" for _ in range(2))
    return draw.choice(("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "1-{}-{}-{}", "+1 {} {} {}", "+1-{}-{}-{}", "+1 ({}) {}-{}")).format(
        area, office, _number(draw, "####")
    )


def _phone(draw: random.Random) -> str:
    if draw.random() < 0.4:
        return _american(draw)
    forms = (
        "+49 30 N######", "+49 (0)30 N######", "+49 171 #######", "030 / N######", "(089) N######", "0171 N######", "0171-N######", "0221/N######",
        "+44 20 7N## ####", "020 7N## ####", "07700 9#####", "+44 7700 9#####", "+33 1 4N ## ## ##", "01 4N ## ## ##", "06.1N.N#.##.##",
        "+34 91N ## ## ##", "+39 06 N### ####", "+31 20 N## ####", "06-N#######", "+41 44 N## ## ##", "044 N## ## ##", "0048 22 N## ## ##",
        "+91 98### #####", "+81 3 N### ####", "+55 11 9#### ####",
    )  # fmt: skip
    return _number(draw, draw.choice(forms))


def _card(draw: random.Random) -> str:
    networks = "4:16 5N:16 34:15 37:15 6011:16 3530:16 622:16 2300:16 36:14 65:16".split()
    start, _, length = draw.choice(networks).partition(":")
    n, sizes = int(length), (4, 4, 4) if length == "16" else (4, 6)
    start = start.replace("N", str(draw.randrange(1, 6)))
    body = start + _number(draw, "#" * (n - 1 - len(start)))
    return _grouped(draw, body + _luhn_digit(body), sizes)


def _id(draw: random.Random) -> str:
    kind = draw.randrange(6)
    if kind == 0:
        return f"{draw.randrange(1, 666):03}-{draw.randrange(1, 100):02}-{draw.randrange(1, 10_000):04}"
    if kind == 1:
        country, form = draw.choice(
            [("DE", "#" * 18), ("FR", "#" * 23), ("ES", "#" * 20), ("AT", "#" * 16), ("GB", "WEST" + "#" * 14), ("BE", "#" * 12)]
        )
        account = _number(draw, form)
        value = int("".join(str(int(c, 36)) for c in account + country + "00"))
        return _grouped(draw, f"{country}{98 - value % 97:02}{account}", (4,) * 6, " ")
    if kind == 2:
        number = draw.randrange(10**7, 10**8)
        return f"{number}{draw.choice(('', '-'))}" + "TRWAGMYFPDXBNJZSQVHLCKE"[number % 23]
    if kind == 3:
        number = f"{draw.choice('12')}{draw.randrange(100):02}{draw.randrange(1, 13):02}{draw.randrange(1, 96):02}{_number(draw, '######')}"
        return _grouped(draw, f"{number}{97 - int(number) % 97:02}", (1, 2, 2, 2, 3, 3), " ")
    if kind == 4:
        while True:
            digits = _number(draw, "N########")
            if (sum(int(d) * (9 - i) for i, d in enumerate(digits[:8])) - int(digits[8])) % 11 == 0:
                return f"BSN {digits}"
    while True:  # one digit twice, one not at all
        chosen = draw.sample(string.digits, 9)
        ten = draw.sample([*chosen, draw.choice(chosen)], 10)
        if ten[0] != "0":
            break
    rest = 10
    for digit in map(int, ten):
        rest = ((rest + digit) % 10 or 10) * 2 % 11
    return "Steuer-ID " + _grouped(draw, "".join(ten) + str((11 - rest) % 10), (2, 3, 3), " ")


_PLANTED: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "email": (_email, "Write to {} today.|(contact: {})|mailto:{}|<{}>|E-mail: {}, or come by.|{} is where she reads."),
    "ip": (_ip, "The host {} answered.|Blocked [{}] after three tries.|from {}, twice|Server: {}"),
    "phone": (_phone, "Call {} today.|Tel.: {}|You reach us at {}, every day.|Phone {} or write.|Fax: {}\n|Her number is {}."),
    "card": (_card, "Card {} was charged.|Visa: {}, thank you.|He read out {} slowly.|card number {} 12/27"),
    "id": (_id, "Her number is {}.|Please note {} on the form.|account {}, as before|({})"),
}


def _barcode(draw: random.Random, start: str) -> str:
    digits = start + _number(draw, "#########")
    digits += next(d for d in string.digits if sum(int(x) * (1, 3)[i % 2] for i, x in enumerate(digits + d)) % 10 == 0)
    return _grouped(draw, digits, (3, 1, 4, 4), "-")


def _not_luhn(draw: random.Random) -> str:
    body = "4" + _number(draw, "#" * 14)
    return _grouped(draw, body + str((int(_luhn_digit(body)) + draw.randrange(1, 10)) % 10), (4, 4, 4))


_HARD: tuple[Callable[[random.Random], str], ...] = (
    lambda draw: f"ISBN {_barcode(draw, '978')}",
    lambda draw: f"barcode {_barcode(draw, '400').replace('-', '')}",
    lambda draw: _number(draw, "ISBN 0-N##-#####-#"),
    lambda draw: f"on {draw.randrange(1, 29):02}.{draw.randrange(1, 13):02}.{draw.randrange(1990, 2026)} {draw.randrange(10, 24)}:30",
    lambda draw: f"{draw.randrange(1990, 2026)}-{draw.randrange(1, 13):02}-{draw.randrange(1, 29):02} {draw.randrange(10, 24)}:15:00",
    lambda draw: f"between {draw.randrange(1800, 1900)}-{draw.randrange(1900, 2000)}",
    lambda draw: _number(draw, "version N.##.N"),
    lambda draw: _number(draw, "version N.N.##.N"),
    lambda draw: _number(draw, "v1.N.#"),
    lambda draw: _number(draw, "$N,###,###.##"),
    lambda draw: _number(draw, "N ### ###,## EUR"),
    lambda draw: _number(draw, "1.### ### ### people"),
    lambda draw: _number(draw, "order no. N##-N##-####"),
    lambda draw: _number(draw, "invoice 0#######-##"),
    lambda draw: _number(draw, "tracking number 1Z########N#"),
    lambda draw: _number(draw, "item N#########"),
    lambda draw: f"number {_not_luhn(draw)}",
    lambda draw: _number(draw, "timestamp 17########.###"),
    lambda draw: _number(draw, "0.##########"),
    lambda draw: f"host {draw.choice(('10.0.', '127.0.', '192.168.', '172.16.'))}{draw.randrange(256)}.{draw.randrange(256)}",
    lambda draw: "2001:db8::" + _number(draw, "N###"),
    lambda draw: "at 12:30:45, std::vector, 00:1a:2b:3c:4d:5e",
    lambda draw: f"{draw.choice(('000', '666', '9' + _number(draw, '##')))}-{_number(draw, 'N#-N###')}",
    lambda draw: f"DE{draw.randrange(2, 98):02}" + _number(draw, "X#" + "#" * 16),
    lambda draw: "icon@2x.png, @decorator and user@localhost",
    lambda draw: _number(draw, "part ##-####-##, size 1#x#x##"),
    lambda draw: "".join(draw.choice("0123456789abcdef") for _ in range(40)),
)


def personal_data(draw: random.Random, n: int) -> dict[str, Score]:
    """Each kind, planted `n` times, and `n` times as many hard negatives as there are forms of them, one to a document of prose."""
    planted: collections.Counter[str] = collections.Counter()
    found: collections.Counter[str] = collections.Counter()
    right: collections.Counter[str] = collections.Counter()
    for kind, (make, frames) in _PLANTED.items():
        for _ in range(n):
            value = make(draw)
            before, after = draw.choice(frames.split("|")).split("{}")
            prefix, suffix = prose(draw, 2) + " " + before, after + " " + prose(draw, 2)
            core = value.removeprefix("BSN ").removeprefix("Steuer-ID ")
            start = len(prefix) + len(value) - len(core)
            places = pii.find(prefix + value + suffix, PII_KINDS)
            planted[kind] += 1
            found.update(place.kind for place in places)
            right[kind] += (start, start + len(core), kind) in places
    for _ in range(n):
        for make in _HARD:
            found.update(place.kind for place in pii.find(f"{prose(draw, 1)} It says {make(draw)}, more or less. {prose(draw, 1)}", PII_KINDS))
    return {f"personal data: {kind}": Score(planted[kind], found[kind], right[kind]) for kind in _PLANTED}


# --- the other rules --------------------------------------------------------------------------------------------------------------------------


def _words(draw: random.Random, n: int) -> list[str]:
    """Words that no text has by chance in the same order."""
    return ["".join(draw.choices(string.ascii_lowercase, k=draw.randrange(2, 9))) for _ in range(n)]


def leaks(draw: random.Random, n: int) -> dict[str, Score]:
    """Passages of an evaluation set of 40 words, `n` of each form, among `n` times two documents that share 12 words, or 13 in another order."""
    passages = [_words(draw, 40) for _ in range(n)]
    rule = overlap.decontaminate(("held out",), 13, lambda source: iter({"question": " ".join(p)} for p in passages))
    forms: dict[str, Callable[[list[str]], str]] = {
        "verbatim": " ".join,
        "other capitals": lambda words: " ".join(word.title() if draw.random() < 0.5 else word.upper() for word in words),
        "other punctuation": lambda words: "".join(word + draw.choice((" ", ", ", " - ", "—", ".\n", " (", "; “")) for word in words),
        "half": lambda words: " ".join(words[10:30]),
    }
    misses: list[Callable[[list[str]], str]] = [
        lambda words: " ".join(words[5:17]),
        lambda words: " ".join([*words[5:11], "not", *words[11:17]]),
        lambda words: " ".join(draw.sample(words[5:18], 13)),
    ]

    def dropped(text: str) -> bool:
        return isinstance(rule.apply(Document(f"{prose(draw, 2)} {text} {prose(draw, 2)}", "")), Dropped)

    wrong = sum(dropped(form(words)) for form in misses for words in passages)
    rights = {name: sum(dropped(form(words)) for words in passages) for name, form in forms.items()}
    return {f"leaked passage, {name}": Score(n, right + wrong, right) for name, right in rights.items()}


def languages(draw: random.Random, n: int) -> dict[str, Score]:
    """Texts of three sentences in other languages, as many as in English; what is dropped is found."""
    rule = language.only(("en",), 0.65)

    def dropped(text: str) -> bool:
        return isinstance(rule.apply(Document(text, "")), Dropped)

    texts = [" ".join(draw.sample([*text.replace("。", ". ").split(". ")], 3)) for text in (draw.choice([*OTHERS.values()]) for _ in range(n))]
    right, wrong = sum(map(dropped, texts)), sum(dropped(prose(draw, 3)) for _ in range(n))
    return {"other language": Score(n, right + wrong, right)}


def wrong_encodings(draw: random.Random, n: int) -> dict[str, Score]:
    """Texts in UTF-8 read as something else, among right ones; found is what changes, right what becomes the text it was."""
    rule = mojibake.mend()
    texts = [
        f"{draw.choice([OTHERS[code] for code in ('de', 'fr', 'es', 'it', 'pl', 'pt', 'ru')])} {draw.choice('“Ja”—… ‘so’ € '.split())}"
        for _ in range(n)
    ]
    found = right = 0
    for text in texts:
        broken = _misread(text, draw.choice(("latin-1", "windows-1252")))
        if draw.random() < 0.2:
            broken = _misread(broken, "windows-1252")
        mended = rule.apply(Document(broken, ""))
        assert isinstance(mended, Document)
        found += mended.text != broken
        right += mended.text == text
    for text in [*texts, *(prose(draw, 3) for _ in range(n))]:
        kept = rule.apply(Document(text, ""))
        assert isinstance(kept, Document)
        found += kept.text != text
    return {"mojibake": Score(n, found, right)}


def _misread(text: str, encoding: str) -> str:
    """UTF-8 read as if it were another encoding; what that has no character for is a control character, as in browsers.

    Source: WHATWG Encoding Standard, section 9, index windows-1252.
    """
    decoded = []
    for byte in text.encode("utf-8"):
        try:
            decoded.append(bytes([byte]).decode(encoding))
        except UnicodeDecodeError:
            decoded.append(chr(byte))
    return "".join(decoded)


_BOILERPLATE = (
    "Home", "Sign in to your account", "Subscribe to our newsletter", "Accept all cookies", "Share on social media", "Privacy policy",
    "Related articles you may like", "All rights reserved by the publisher", "Download our app now", "Back to top of page",
)  # fmt: skip


def pages(draw: random.Random, n: int) -> dict[str, Score]:
    """Pages of HTML: sentences of the main text and lines of menus, adverts and footers; found is each line of what comes out."""
    rule = html.main_text(every=True)
    planted = found = right = 0
    for _ in range(n):
        paragraphs = prose(draw, draw.randrange(12, 40)).split("\n")
        menu = "".join(f"<li><a href='/{i}'>{line}</a></li>" for i, line in enumerate(draw.sample(_BOILERPLATE, 6)))
        footer = " ".join(f"<span>{line}</span>" for line in draw.sample(_BOILERPLATE, 4))
        main = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
        frame = draw.choice(("<article>{}</article>", "<main><div class='post-content'>{}</div></main>", "<div id='content'>{}</div>"))
        page = f"<html><head><title>A page</title><script>var x = 1;</script></head><body><header><nav><ul>{menu}</ul></nav></header>"
        page += f"{frame.format(main)}<aside class='sidebar'><ul>{menu}</ul></aside><footer>{footer}</footer></body></html>"
        after = rule.apply(Document(page, "", is_html=True))
        lines = [] if isinstance(after, Dropped) else after.text.split("\n")
        planted, found = planted + len(paragraphs), found + len(lines)
        right += sum(line in paragraphs for line in lines)
    return {"main text of a page": Score(planted, found, right)}


def poor_pages(draw: random.Random, n: int) -> dict[str, Score]:
    """Texts that are lists of boilerplate, one sentence over and over, or symbols, as many as of good prose, under all filters."""
    chain = [filters.quality(name) for name in FILTERS]
    makes: list[Callable[[], str]] = [
        lambda: "\n".join(draw.choices(_BOILERPLATE, k=60)),
        lambda: " ".join([sentence(draw)] * 40),
        lambda: "\n".join(f"# {draw.randrange(10**9)} | {draw.randrange(10**9)} | ..." for _ in range(60)),
        lambda: "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor. " + prose(draw, 20),
        lambda: f"function f() {{ return 1; }}. {prose(draw, 20)}",
    ]

    def dropped(text: str) -> bool:
        return isinstance(_through(Document(text, ""), chain), Dropped)

    right = sum(dropped(draw.choice(makes)()) for _ in range(n))
    wrong = sum(dropped(prose(draw, 30)) for _ in range(n))
    return {"boilerplate": Score(n, right + wrong, right)}


NEAR = {"1": 0.01, "2": 0.02, "5": 0.05}  # % and share of the words that a near copy has others of


def near_copies(draw: random.Random, n: int) -> dict[str, Score]:
    """Texts of 300 words: `n` with a copy each in which some words are others, for each share, and `n` that share their first half with another."""
    texts = {form: [_words(draw, 300) for _ in range(n)] for form in NEAR}
    copies = {
        form: [[draw.choice(words) if draw.random() < share else word for word in words] for words in texts[form]] for form, share in NEAR.items()
    }
    halves = [[*words[:150], *_words(draw, 150)] for words in texts["1"]]
    order = [" ".join(words) for part in (*texts.values(), *copies.values(), halves) for words in part]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in order), encoding="utf-8")
        config = DataConfig(source=str(path), tokenizer="byte", val_fraction=0.0, workers=1, clean=CleanConfig(near_duplicates=True))
        prepare.prepare(config, Path(name) / "out", say=lambda line: None)
        tokens = open_tokens(Path(name) / "out", "train")
        kept = set("".join(map(chr, tokens.read(0, len(tokens)).tolist())).split(chr(256)))
    dropped = [text not in kept for text in order]
    first_copies = len(NEAR) * n
    wrong = sum(dropped[:first_copies]) + sum(dropped[2 * first_copies :])
    rights = {form: sum(dropped[first_copies + i * n : first_copies + (i + 1) * n]) for i, form in enumerate(NEAR)}
    return {f"near copy, {form} % of the words others": Score(n, right + wrong, right) for form, right in rights.items()}


def scores(seed: int, n: int) -> dict[str, Score]:
    """All kinds, from `seed`."""
    found: dict[str, Score] = {}
    for part in (personal_data, leaks, languages, wrong_encodings, pages, poor_pages, near_copies):
        found |= part(random.Random(f"{seed} {part.__name__}"), n)
    return found


# --- speed ------------------------------------------------------------------------------------------------------------------------------------


def _through(document: Document, chain: list[Rule]) -> Document | Dropped:
    for rule in chain:
        after = rule.apply(document)
        if isinstance(after, Dropped):
            return after
        document = after
    return document


def _texts(source: str, seed: int, n: int) -> list[str]:
    if not source:
        draw = random.Random(seed)
        return [prose(draw, draw.randrange(5, 80)) for _ in range(n)]
    return [document.text for document in sources.documents(SourceConfig(source=source))]


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--text", default="", help="JSON Lines with a field `text`; default: made text")
    arguments.add_argument("--documents", type=int, default=200, help="of each kind (default 200)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--rounds", type=int, default=3)
    args = arguments.parse_args()

    print("| planted | number | found | precision | recall |\n|---|---|---|---|---|")
    for kind, score in scores(args.seed, args.documents).items():
        print(f"| {kind} | {score.planted} | {score.found} | {score.precision:.3f} | {score.recall:.3f} |")

    texts = _texts(args.text, args.seed, args.documents)
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    config = CleanConfig(mojibake=True, languages=("en",), language_threshold=0.0, filters=FILTERS, pii="mask")
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "held_out.txt"
        held_out.write_text("\n".join(" ".join(_words(random.Random(i), 40)) for i in range(1000)), encoding="utf-8")
        chain = rules(dataclasses.replace(config, evaluation_sets=(str(held_out),)))
    documents = [Document(text, "") for text in texts]
    print(f"\n| rule, over {len(texts)} documents, {megabytes:.2f} MB | MB/s of a core, median of {args.rounds} | dropped |\n|---|---|---|")
    for rule in chain[:-1]:
        seconds = [_cpu_seconds(lambda rule=rule: [rule.apply(document) for document in documents]) for _ in range(args.rounds)]
        reasons = collections.Counter(after.reason for after in map(rule.apply, documents) if isinstance(after, Dropped))
        shown = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "none"
        print(f"| {rule.name} | {megabytes / statistics.median(seconds):.2f} | {shown} |")
    pages = [
        Document("<html><body><article><p>" + text.replace("\n", "</p><p>") + "</p></article></body></html>", "", is_html=True) for text in texts
    ]
    main_text = html.main_text(every=True)
    seconds = [_cpu_seconds(lambda: [main_text.apply(page) for page in pages]) for _ in range(args.rounds)]
    print(f"| html, of these texts as pages | {megabytes / statistics.median(seconds):.2f} | |")


if __name__ == "__main__":
    main()
