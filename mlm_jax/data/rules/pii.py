"""Personal data: e-mail and IP addresses, numbers of phones, payment cards and persons, found by their form and check digits.

Every pattern is bounded where it begins at a character, so that the time grows as the length of the text, whatever the text.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mlm_jax.data.document import Document, Dropped, Rule

# GPT-2 has each of these words as one token, and the brackets as one each; of EMAIL and PHONE it makes two.
PLACEHOLDERS = {kind: f"<{kind}>" for kind in ("email", "ip", "phone", "card", "id")}


class Found(NamedTuple):
    """Where personal data is in a text."""

    start: int
    end: int
    kind: str


Spans = Iterator[tuple[int, int]]


def _pattern(text: str, flags: int = 0) -> re.Pattern[str]:
    r"""The pattern, in which \d is a digit from 0 to 9: those of other scripts have a meaning to `int`, and none in these numbers."""
    return re.compile(text.replace(r"[^\W\d_]", r"[^\W0-9_]").replace(r"[^\d", "[^0-9").replace(r"\d", "[0-9]"), flags)


def personal_data(action: str, kinds: tuple[str, ...]) -> Rule:
    """Puts placeholders (`action` = mask) in place of personal data of these kinds, or drops documents that hold some (drop)."""

    def apply(document: Document) -> Document | Dropped:
        texts = (document.text, document.prompt)
        found = [find(text, kinds) for text in texts]
        if not any(found):
            return document
        if action == "drop":
            return Dropped(f"personal data: {next(first[0].kind for first in found if first)}")
        text, prompt = (_masked(text, places) for text, places in zip(texts, found, strict=True))
        return document._replace(text=text, prompt=prompt)

    return Rule("pii", apply)


def find(text: str, kinds: tuple[str, ...]) -> list[Found]:
    """The places of personal data of these kinds, in order; none overlap."""
    found: list[Found] = []
    taken = bytearray(len(text))
    for kind, finder in _FINDERS.items():  # what has the stricter form comes first: an IBAN holds groups of digits like those of a card
        for start, end in finder(text) if kind in kinds else ():
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                found.append(Found(start, end, kind))
    return sorted(found)


def _masked(text: str, found: list[Found]) -> str:
    parts, end = [], 0
    for place in found:
        parts += [text[end : place.start], PLACEHOLDERS[place.kind]]
        end = place.end
    return "".join([*parts, text[end:]])


def _digits(text: str) -> str:
    return re.sub("[^0-9]", "", text)


def _before(text: str, start: int, pattern: re.Pattern[str], length: int = 32) -> bool:
    """The pattern, which ends in $, fits what stands right before a place."""
    return bool(pattern.search(text[max(start - length, 0) : start]))


# --- e-mail -----------------------------------------------------------------------------------------------------------------------------------

# Source: RFC 5321, section 4.5.3.1 for the 64 characters before the @; RFC 1035, section 2.3.4 for the 63 of a label.
_DOMAIN = _pattern(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:[^\W\d_]{2,24}|xn--[a-z0-9-]{2,59})(?![\w-])", re.IGNORECASE)
_NO_TOP_LEVEL = frozenset("png jpg jpeg gif svg webp ico bmp css js json html htm php pdf mp3 mp4 txt xml".split())  # icon@2x.png


def _emails(text: str) -> Spans:
    at = text.find("@")
    while at >= 0:
        start = at
        while start > max(at - 64, 0) and (text[start - 1].isalnum() or text[start - 1] in "._%+-") and text[start - 1 : start + 1] != "..":
            start -= 1
        while start < at and text[start] in ".-%+":  # what ends a sentence before it, or a dash, is no part of it
            start += 1
        domain = _DOMAIN.match(text, at + 1) if start < at and text[at - 1] != "." else None
        if domain and domain[0].rpartition(".")[2].lower() not in _NO_TOP_LEVEL:
            yield start, domain.end()
        at = text.find("@", at + 1)


# --- numbers of persons -----------------------------------------------------------------------------------------------------------------------

_SSN = _pattern(r"(?<![\w-])(?<!\d[ .])([0-8]\d\d)([- ]?)(\d\d)\2(\d{4})(?!\w)(?![-.]\d)")
_SSN_WORD = _pattern(r"(?:\bssns?|social security)\b[^0-9\n]*$", re.IGNORECASE)
_IBAN = _pattern(r"(?<![A-Za-z0-9])([A-Z]{2})\d\d(?=[ -]?[A-Z0-9])")
# Characters of an IBAN by country. Source: SWIFT, IBAN Registry (ISO 13616).
_IBAN_LENGTHS = {
    code: int(length)
    for length, codes in {
        "15": "NO", "16": "BE", "18": "DK FI FO GL NL", "19": "MK SI", "20": "AT BA EE KZ LT LU XK", "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA", "23": "AE GI IL IQ TL", "24": "AD CZ ES MD PK RO SA SE SK TN VG", "25": "LY PT ST",
        "26": "IS TR", "27": "FR GR IT MC MR SM", "28": "AL AZ BY CY DO GT HU LB LC PL SV", "29": "BR EG PS QA UA", "30": "JO KW MU",
        "31": "MT SC",
    }.items()
    for code in codes.split()
}  # fmt: skip
_DNI = _pattern(r"(?<![\w.-])(\d{8}|\d\d\.\d{3}\.\d{3}|[XYZ]-?\d{7})[- ]?([A-Z])(?!\w)")
_BSN = _pattern(r"(?<![\w.-])\d{9}(?![\w-])|(?<![\w.-])\d{4}\.\d\d\.\d{3}(?![\w-])")
_BSN_WORD = _pattern(r"(?:\bbsn|burger ?service ?nummer|sofi-?nummer)\b\D*$", re.IGNORECASE)
_NIR = _pattern(r"(?<![\w.-])[1278] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d(?![\w-])")
_TAX_ID = _pattern(r"(?<![\w.-])[1-9]\d ?\d{3} ?\d{3} ?\d{3}(?![\w-])")
_TAX_ID_WORD = _pattern(r"(?:steuer|id-?nr|\btin\b|\btax )\D*$", re.IGNORECASE)


def _ids(text: str) -> Spans:
    for m in _SSN.finditer(text):
        # Only dashes are its usual form; other ones are a number like any other unless a word says what it is.
        named = _before(text, m.start(), _SSN_WORD)
        if is_ssn(_digits(m[0])) and (named or (m[2] == "-" and not _before(text, m.start(), _OTHER_NUMBER))):
            yield m.span()
    for m in _IBAN.finditer(text):
        if end := _iban_end(text, m.start(), _IBAN_LENGTHS.get(m[1], 0)):
            yield m.start(), end
    for m in _DNI.finditer(text):
        if is_dni(re.sub(r"[ .-]", "", m[0])):
            yield m.span()
    for m in _BSN.finditer(text):
        if is_bsn(_digits(m[0])) and _before(text, m.start(), _BSN_WORD):
            yield m.span()
    for m in _NIR.finditer(text):
        if is_nir(m[0].replace(" ", "")):
            yield m.span()
    for m in _TAX_ID.finditer(text):
        if is_tax_id(_digits(m[0])) and _before(text, m.start(), _TAX_ID_WORD, 48):
            yield m.span()


def is_ssn(digits: str) -> bool:
    """A number that the Social Security of the United States may have given.

    Source: Social Security Administration, "Social Security Number Randomization" (no area 000, 666, 900-999; no group 00; no serial 0000) and
    "Social Security Cards Issued by Woolworth" (078-05-1120; with it 219-09-9999, that an advertisement showed).
    """
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    given = area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
    return len(digits) == 9 and given and digits not in ("078051120", "219099999")


def is_iban(code: str) -> bool:
    """An international bank account number whose length is its country's and whose check digits are right.

    Source: ISO 13616 and ISO/IEC 7064 MOD 97-10: letters count 10 to 35, the first four characters go to the end, and the rest by 97 is 1.
    """
    moved = code[4:] + code[:4]
    return len(code) == _IBAN_LENGTHS.get(code[:2]) and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _iban_end(text: str, start: int, length: int) -> int:
    """Where the IBAN of `length` characters that begins at a place ends; 0 where none does. Single spaces or dashes may divide it."""
    code, i = "", start
    while length and len(code) < length and i < len(text):
        if text[i] in " -" and text[i - 1] not in " -":
            i += 1
        if not (text[i : i + 1].isascii() and text[i : i + 1].isalnum()):
            return 0
        code += text[i]
        i += 1
    ends = len(code) == length and not text[i : i + 1].isalnum()
    return i if length and ends and is_iban(code.upper()) else 0


def is_dni(code: str) -> bool:
    """A Spanish identity number: eight digits, of foreigners one of XYZ for the first, and a letter by the rest by 23.

    Source: Ministerio del Interior, "Cálculo del dígito de control del NIF-NIE".
    """
    number = str("XYZ".index(code[0])) + code[1:-1] if code[0] in "XYZ" else code[:-1]
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == code[-1]


def is_bsn(digits: str) -> bool:
    """A Dutch citizen's number: the digits times 9, 8, ..., 2 and -1 add up to a multiple of 11.

    Source: Rijksdienst voor Identiteitsgegevens, Logisch Ontwerp BSN ("elfproef").
    """
    total = sum(int(digit) * weight for digit, weight in zip(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1), strict=True))
    return total % 11 == 0 and total > 0


def is_nir(code: str) -> bool:
    """A French social security number: its last two digits are 97 less the rest of the others by 97; Corsica's 2A and 2B count as 19 and 18.

    Source: INSEE, "Numéro de sécurité sociale / NIR"; décret n° 82-103 du 22 janvier 1982.
    """
    number = code[:13].replace("2A", "19").replace("2B", "18")
    return 97 - int(number) % 97 == int(code[13:])


def is_tax_id(digits: str) -> bool:
    """A German tax number: of the first ten digits one stands there two or three times, and the eleventh checks them.

    Source: Bundeszentralamt für Steuern, "Steuerliche Identifikationsnummer"; § 139b AO; ISO/IEC 7064 MOD 11,10.
    """
    counts = sorted(digits[:10].count(digit) for digit in set(digits[:10]))
    product = 10
    for digit in digits[:10]:
        product = (((int(digit) + product) % 10 or 10) * 2) % 11
    return digits[0] != "0" and counts[-1] in (2, 3) and counts[-2] == 1 and (11 - product) % 10 == int(digits[10])


# --- payment cards ----------------------------------------------------------------------------------------------------------------------------

_CARD = _pattern(
    r"(?<![\w.])(?<!\d-)(?<![A-Z]\d\d )(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5})(?!\w)(?!-\d)(?!\.\d)"
)


def _cards(text: str) -> Spans:
    for m in _CARD.finditer(text):
        tail = re.search(r"[ -]\d{1,3}\Z", m[0])  # a 17th digit and more, or the number of three digits from the back of the card
        for end in (m.end(), m.end() - len(tail[0]) if tail else 0):
            if end and is_card(_digits(text[m.start() : end])):
                yield m.start(), end
                break


def is_card(digits: str) -> bool:
    """A number of a known network of payment cards whose check digit is right, and that is no barcode.

    Source: ISO/IEC 7812-1, annex B (Luhn's formula), and the networks' ranges: Visa 4; Mastercard 51-55 and 2221-2720; American Express 34
    and 37; Diners Club 300-305, 36, 38 and 39; Discover 6011, 644-649 and 65; JCB 3528-3589; UnionPay 62.
    """
    n, four = len(digits), int(digits[:4])
    known = (
        (digits[0] == "4" and n in (13, 16, 19))
        or ((5100 <= four <= 5599 or 2221 <= four <= 2720) and n == 16)
        or (digits[:2] in ("34", "37") and n == 15)
        or ((3000 <= four <= 3059 or digits[:2] in ("36", "38", "39")) and 14 <= n <= 19)
        or ((four == 6011 or 6440 <= four <= 6599 or 3528 <= four <= 3589 or digits[:2] == "62") and 16 <= n <= 19)
    )
    return known and luhn(digits) and not (n == 13 and _is_barcode(digits))


def luhn(digits: str) -> bool:
    """From the right, the digits and twice every second one, its own digits added, add up to a multiple of 10."""
    return sum(int(d) if i % 2 == 0 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


def _is_barcode(digits: str) -> bool:
    """The check digit of an EAN-13, such as an ISBN, is right. Source: GS1 General Specifications, section 7.9."""
    return sum(int(d) * (1, 3)[i % 2] for i, d in enumerate(digits)) % 10 == 0


# --- IP addresses -----------------------------------------------------------------------------------------------------------------------------

_IPV4 = _pattern(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-])(?!\.\w)")
# All global addresses of one computer begin with 2 or 3. Source: RFC 4291, section 2.4, and IANA's registry of IPv6 global unicast addresses.
_IPV6 = _pattern(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = _pattern(r"(?:\bv|version|release|\bver\.?|build|firmware|driver|update|section|chapter|clause|§)[ :#=-]{0,2}$", re.IGNORECASE)


def _ips(text: str) -> Spans:
    for pattern in (_IPV4, _IPV6):
        for m in pattern.finditer(text):
            try:
                is_global = ipaddress.ip_address(m[0]).is_global  # not private, of this machine, for examples, or reserved
            except ValueError:
                continue
            if is_global and not _before(text, m.start(), _VERSION):
                yield m.span()


# --- phones -----------------------------------------------------------------------------------------------------------------------------------

# A number of another kind: what stands right before it says so.
_OTHER_NUMBER = _pattern(
    r"(?:order|invoice|part|sku|ref|reference|tracking|serial|model|item|case|ticket|isbn|issn|doi|article|bestell|rechnung|artikel|commande)"
    r"\w{0,8}[ .:#-]{0,3}(?:(?:no|nr|number|nummer|num|code|id|is)\b[ .:#-]{0,3}){0,2}$",
    re.IGNORECASE,
)
_PHONE_WORD = _pattern(
    r"(?:\b(?:tel|telephone|phone|ph|call|fax|mobile?|cell|whatsapp|sms|text|telefon|telefono|teléfono|téléphone|téléfono|handy|móvil|ring)\b)"
    r"(?:[ .:#(-]{0,3}\b(?:number|no|nr|us|me|at|on|is|him|her|them|under|or|al)\b){0,3}[ .:#(-]{0,3}$",
    re.IGNORECASE,
)
_GAP = r"[ \u00a0\u2011./()-]{0,3}"
_INTERNATIONAL = _pattern(rf"(?<![\w+])(?:\+ ?|(?<!\d[ ./-])00(?=[1-9]\d{{0,2}}[ \u00a0./-]))\(?[1-9](?:{_GAP}\d){{7,14}}(?!\d)(?![.,]\d)")
_AMERICAN = _pattern(r"(?<![\w$€£])(?<!\d[-. /])(?:1[ .-])?(?:\(([2-9]\d\d)\)[ -]?|([2-9]\d\d)[ .-])([2-9]\d\d)[ .-]\d{4}(?!\w)(?![-./]\d)(?! \d)")
_EUROPEAN = _pattern(
    r"(?<![\w+$€£])(?<!\d[-. /])(?:\(0[1-9]\d{0,4}\)|0[1-9]\d{0,4})(?: ?[/.-] ?| |(?<=\)))\d{2,8}(?:[ ./-]\d{2,8}){0,4}(?!\w)(?![-./,]\d)(?! \d\d)"
)
_NAMED = _pattern(r"(?<![\w+$€£])(?<!\d[-. /])\(?\d(?:[ .()/-]{0,2}\d){8,14}(?!\w)(?![-./,]\d)(?! \d)")
_DATE = _pattern(r"\(?(?:\d{1,2}([./ -])\d{1,2}\1(?:19|20)\d\d|(?:19|20)\d\d([./ -])\d{1,2}\2\d{1,2})(?!\d)")
# Source: ITU-T E.164, list of assigned country codes (2016); in each string the digits that may follow the first.
_COUNTRY = _pattern(
    r"1|7|2(?:0|7|1[1-368]|2\d|3\d|4\d|5[0-8]|6\d|9[0178])|3(?:[0-4]|6|9|5\d|7[0-8]|8[0-35-79])|4(?:[013-9]|2[0134])"
    r"|5(?:[1-8]|0\d|9\d)|6(?:[0-6]|7[02-9]|8\d|9[0-2])|8(?:[1246]|0[08]|5[02356]|7[08]|8[0-368])|9(?:[0-58]|6[0-8]|7\d|9[2-68])"
)


def _phones(text: str) -> Spans:
    for m in _INTERNATIONAL.finditer(text):
        digits = _digits(m[0])
        digits = digits[2:] if m[0].startswith("00") else digits
        american = re.fullmatch(r"1[2-9]\d\d[2-9]\d{6}", digits)
        if 9 <= len(digits) <= 15 and _COUNTRY.match(digits) and (american or digits[0] != "1") and len(set(digits)) > 2:
            yield m.span()
    for m in _AMERICAN.finditer(text):
        area = m[1] or m[2]
        if "11" not in (area[1:], m[3][1:]) and not _before(text, m.start(), _OTHER_NUMBER):
            yield m.span()
    for m in _EUROPEAN.finditer(text):
        if 9 <= len(_digits(m[0])) <= 12 and not _DATE.match(m[0]) and not _before(text, m.start(), _OTHER_NUMBER):
            yield m.span()
    for m in _NAMED.finditer(text):
        if _before(text, m.start(), _PHONE_WORD) and not _DATE.match(m[0]):
            yield m.span()


_FINDERS: dict[str, Callable[[str], Spans]] = {"email": _emails, "id": _ids, "card": _cards, "ip": _ips, "phone": _phones}
