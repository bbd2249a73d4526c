import random
import subprocess
import sys

import pytest

from experiments import bench_clean
from mlm_jax.config import PII_KINDS
from mlm_jax.data import tokenizer
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import pii

# Published examples: Wikipedia on Luhn's formula, and test numbers that Stripe and PayPal publish; SWIFT's IBAN registry; the Spanish ministry's
# 12345678Z; BSNs for tests of the Dutch government; French Wikipedia on the NIR; the German Bundeszentralamt's test numbers.
EXAMPLES = {
    pii.luhn: "79927398713 4242424242424242 378282246310005",
    pii.is_card: "4242424242424242 5555555555554444 2223003122003222 378282246310005 6011111111111117 3056930009020004 36227206271667 "
    "3566002020360505 6200000000000005",
    pii.is_iban: "GB29NWBK60161331926819 DE89370400440532013000 FR1420041010050500013M02606 NO9386011117947 MT84MALT011000012345MTLCAST001S "
    "NL91ABNA0417164300 BE68539007547034 CH9300762011623852957 ES9121000418450200051332 PL61109010140000071219812874",
    pii.is_dni: "12345678Z X1234567L",
    pii.is_bsn: "111222333 123456782",
    pii.is_nir: "255081416802538 269054958815780",
    pii.is_tax_id: "86095742719 47036892816 65929970489 57549285017",
    pii.is_ssn: "457555462",
}


def found(text: str, kinds=PII_KINDS) -> list[tuple[str, str]]:
    return [(text[place.start : place.end], place.kind) for place in pii.find(text, kinds)]


@pytest.mark.parametrize("check", [*EXAMPLES], ids=lambda check: check.__name__)
def test_published_numbers_pass_their_check(check):
    assert [code for code in EXAMPLES[check].split() if not check(code)] == []


@pytest.mark.parametrize("check", [pii.luhn, pii.is_iban, pii.is_dni, pii.is_bsn, pii.is_nir, pii.is_tax_id], ids=lambda check: check.__name__)
def test_any_other_digit_fails_the_check(check):
    # All these check digits are known to find every error in one digit.
    for code in EXAMPLES[check].split():
        for i, c in enumerate(code):
            for other in "0123456789":
                assert not c.isdigit() or other == c or not check(code[:i] + other + code[i + 1 :])


def test_numbers_that_were_never_given_are_none():
    for digits in ("000123456", "666123456", "900123456", "123004567", "123450000", "078051120", "219099999"):
        assert not pii.is_ssn(digits)
    assert not pii.is_card("1234567812345670") and pii.luhn("1234567812345670")  # no network has it
    assert (
        pii.luhn("4006381300063") and not pii.is_card("4006381300063") and pii.is_card("4006381300006")
    )  # the first is a barcode of Germany as well
    assert not pii.is_iban("DE8937040044053201300") and not pii.is_iban("XX89370400440532013000")
    corsica = "2A" + "004123"  # with the key as the decree has it, 2A for 19
    key = 97 - int("18501" + "19" + "004123") % 97
    assert pii.is_nir(f"18501{corsica}{key:02}") and not pii.is_nir(f"18501{corsica}{key % 97 + 1:02}")


@pytest.mark.parametrize(
    "text",
    ["joe.doe+x@mail.example.co.uk", "müller@bücher.de", "a@b.io", "x_y@xn--bcher-kva.de", "o%b@host-name.museum"],
)  # fmt: skip
def test_mail_addresses_are_found_whole(text):
    for frame in ("{}", "Write to {}.", "<{}>", "mailto:{}?subject=x", "({}),", "see...{}!", "“{}”"):
        assert found(frame.format(text)) == [(text, "email")]


def test_what_has_an_at_sign_and_is_no_mail_address_stays():
    for text in ("icon@2x.png", "@decorator.name", "user@localhost", "a @ b.com", "@b.com", "a@.com", "a.@b.com", "a@b", "a@-b.com"):
        assert found(text) == []


@pytest.mark.parametrize("text", ["8.8.8.8", "185.199.108.153", "2001:4860:4860::8888", "2a03:2880:f12f:83:face:b00c:0:25de"])
def test_global_ip_addresses_are_found(text):
    for frame in ("{}", "from {} to", "[{}]", "{}.", "({})", "host={},"):
        assert found(frame.format(text)) == [(text, "ip")]


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1 192.168.1.1 127.0.0.1 172.16.0.9 169.254.1.1 192.0.2.1 0.0.0.0 255.255.255.255", "::1 fe80::1 2001:db8::1 fd00::1", "256.1.1.1 1.2.3",
     "1.2.3.4.5", "version 10.15.7.1, v8.8.8.8, Section 8.8.8.8 and build: 8.8.8.8", "12:30:45 std::vector a::b dead:beef", "08.8.8.8"],
)  # fmt: skip
def test_private_addresses_versions_and_times_stay(text):
    assert found(text) == []


@pytest.mark.parametrize(
    "text",
    ["+1 415 555 2671", "(415) 555-2671", "415-555-2671", "415.555.2671", "1-415-555-2671", "+44 20 7946 0958", "020 7946 0958", "07700 900123",
     "+49 (0)30 123456-78", "030/12345678", "(030) 1234567", "0171-1234567", "01 23 45 67 89", "06.12.34.56.78", "+33 1 23 45 67 89", "06-12345678",
     "0049 30 1234567", "+91 98765 43210", "+8613812345678", "+41 44 668 18 00"],
)  # fmt: skip
def test_phone_numbers_are_found_whole(text):
    for frame in ("{}", "Call {} today.", "Tel.: {}", "({})" if "(" not in text else "{}", "{}, or"):
        assert found(frame.format(text)) == [(text, "phone")]


def test_digits_alone_are_a_phone_number_where_a_word_says_so():
    for text in ("tel 912 34 56 78", "Call me at 4155552671", "teléfono: 612345678", "WhatsApp 15551234567"):
        assert [kind for _, kind in found(text)] == ["phone"]
    for text in ("4155552671", "population 4155552671", "it costs 912 345 678 in all", "call 911", "call 12345678"):
        assert found(text) == []


@pytest.mark.parametrize(
    "text",
    ["ISBN 978-0-306-40615-7", "0-306-40615-2", "01.02.2003 10:30", "2024-05-05 12", "12-05-2023 10 30", "1 234 567,00", "$1,234,567.00", "1999-2003",
     "order no. 415-555-2671", "Invoice: 0171-1234567", "3.14159265358979", "0.123456789012", "+5 000 000 000", "415-555-2671-8", "211-411-1234",
     "12 415-555-2671", "+1 000 000 0000", "+999 123 456 789", "1Z12345E0205271688", "4155552671abc", "$415 555 2671", "192-168-1001"],
)  # fmt: skip
def test_isbns_dates_prices_and_order_numbers_stay(text):
    assert found(text) == []


def test_cards_are_found_in_every_grouping_and_without_what_follows():
    for text in ("4111 1111 1111 1111", "4111-1111-1111-1111", "4111111111111111", "3782 822463 10005", "3622 720627 1667", "36227206271667"):
        for frame in ("{}", "Visa: {} 12/27", "{} 123,", "no {}."):
            assert found(frame.format(text)) == [(text, "card")]
    for text in ("4111 1111 1111 1112", "4111 1111 1111", "4111 1111-1111 1111", "41111111111111111111", "x4111111111111111", "0.4111111111111111"):
        assert found(text) == []


def test_numbers_of_persons_are_found_and_some_only_where_a_word_says_so():
    for text in (
        "457-55-5462",
        "DE89 3704 0044 0532 0130 00",
        "GB29NWBK60161331926819",
        "12345678Z",
        "12.345.678-Z",
        "X1234567L",
        "2 55 08 14 168 025 38",
    ):
        for frame in ("{}", "no {} BIC", "({}),", "{}."):
            assert found(frame.format(text)) == [(text, "id")]
    for text, number in (("SSN: 457 55 5462", "457 55 5462"), ("BSN 111222333", "111222333"), ("Steuer-ID: 86 095 742 719", "86 095 742 719")):
        assert found(text) == [(number, "id")]
        assert found(f"so {number} it is") == []
    for text in (
        "457-55-54621",
        "part 457-55-5462",
        "000-55-5462",
        "DE88 3704 0044 0532 0130 00",
        "12345678A",
        "2 55 08 14 168 025 39",
        "BSN 111222334",
    ):
        assert found(text) == []


def test_digits_of_other_scripts_are_no_numbers():
    assert found("BSN ١١١٢٢٢٣٣٣, ４１１１１１１１１１１１１１１１, ٤٥٧-٥٥-٥٤٦٢, ٨.٨.٨.٨, +٤٤ ٢٠ ٧٩٤٦ ٠٩٥٨") == []


MIXED = "Write to a@b.io or call +44 20 7946 0958 from 8.8.8.8; card 4111 1111 1111 1111, SSN 457-55-5462."


def test_masking_puts_a_word_for_each_kind_and_leaves_the_rest():
    after = pii.personal_data("mask", PII_KINDS).apply(Document(MIXED, "a", prompt=MIXED, url="u"))
    masked = "Write to <email> or call <phone> from <ip>; card <card>, SSN <id>."
    assert after == Document(masked, "a", prompt=masked, url="u")
    assert pii.personal_data("mask", PII_KINDS).apply(after) == after
    only = pii.personal_data("mask", ("ip", "card")).apply(Document(MIXED, ""))
    assert only.text == MIXED.replace("8.8.8.8", "<ip>").replace("4111 1111 1111 1111", "<card>")


def test_dropping_names_the_kind_that_comes_first():
    rule = pii.personal_data("drop", PII_KINDS)
    assert rule.apply(Document(MIXED, "")) == Dropped("personal data: email")
    assert rule.apply(Document("nothing", "", prompt="from 8.8.8.8")) == Dropped("personal data: ip")
    assert rule.apply(Document("nothing", "")) == Document("nothing", "")


def test_each_placeholder_is_three_tokens_of_gpt2():
    gpt2 = tokenizer.gpt2()
    for word in pii.PLACEHOLDERS.values():
        assert [gpt2.decode([i]) for i in gpt2.encode(f"{word} ")][:3] == ["<", word[1:-1], ">"]


@pytest.mark.parametrize("length", [50_000, pytest.param(250_000, marks=pytest.mark.slow)])
def test_hostile_text_takes_time_as_its_length(length):
    # In a process of its own, which can be ended: a pattern that is not linear needs many times as long.
    units = (
        "1",
        "1 ",
        "12 ",
        "1-",
        "01 ",
        "(0",
        "+",
        "+1",
        "00 1",
        "1.",
        "4111 ",
        "a@",
        "@",
        "a.",
        "a@b.",
        "2000:",
        "::",
        "DE12 ",
        "DE89 3704 ",
        "A1",
        "X1",
    )
    units += ("tel ", "ssn ", "order no ", "415-555-", "(415) ", "0123 45 67 ", "steuer ", "bsn ", "version ", " ", "-", "a-", "é@é.", "1\n")
    code = f"from mlm_jax.data.rules import pii\nfor unit in {units}: pii.find(unit * ({length} // len(unit)), {PII_KINDS})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=max(60, length // 2500))


def test_personal_data_is_found_and_what_looks_like_it_is_not():
    for kind, score in bench_clean.personal_data(random.Random(1), 100).items():
        assert score.precision >= 0.95 and score.recall >= 0.95, (kind, score)
