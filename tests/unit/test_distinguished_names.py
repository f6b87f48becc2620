"""Comparing certificate names as RabbitMQ 4.3.6 writes them with those in the registry."""

import pytest

from authbackend.enforcement.distinguished_names import common_name, same_name

TERM = "{asn1_OPENTYPE\\,\\<\\<"


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        ('CN=A,O=Acme\\, \\"Inc\\" \\+ \\<a\\>\\;\\\\x=#,C=SE', 'CN=A,O=Acme\\, \\"Inc\\" \\+ \\<a\\>\\;\\\\x=#,C=SE'),
        ("1.2.840.113549.1.9.1=a\\,b\\+c@example.com,CN=A", "EMAILADDRESS=a\\,b\\+c@example.com,CN=A"),
        ("E=a@b,CN=A", "1.2.840.113549.1.9.1=a@b,CN=A"),
        ("emailAddress=a@b,CN=A", "EMAILADDRESS=a@b,CN=A"),
        ("CN=A,DC=\\ #ex\\,CN=x\\ ,DC=com", "CN=A,DC=\\ #ex\\,CN=x\\ ,DC=com"),
        ("OU=x+2.5.4.5=SN 7+CN=A,O=Org", "OU=x+SERIALNUMBER=SN 7+CN=A,O=Org"),
        ("CN=A+2.5.4.5=SN 7+OU=x,O=Org", "OU=x+SERIALNUMBER=SN 7+CN=A,O=Org"),
        ("CN=A,O=\\ ,O=trail\\ ,O=\\#hash,O=\\ lead", "CN=A,O=\\20,O=trail\\20,O=\\23hash,O=\\20lead"),
        ("CN=A,O=Ünï 日本 😀", "CN=A,O=\\C3\\9Cn\\C3\\AF \\E6\\97\\A5\\E6\\9C\\AC \\F0\\9F\\98\\80"),
        ("CN=A,O=a\tb\x7fc~\n", "CN=A,O=a\\09b\\7Fc\\7E\\0A"),
        ("CN=A,O=aÜb", "CN=A,O=a\\C3\\83\\C2\\9Cb"),  # in a TeletexString
        ("2.5.4.44=g,2.5.4.43=in,2.5.4.42=giv,2.5.4.4=sur", "GENERATIONQUALIFIER=g,INITIALS=in,GIVENNAME=giv,SN=sur"),
        ("2.5.4.65=p,2.5.4.12=t,2.5.4.46=q,ST=s,L=l", "PSEUDONYM=p,TITLE=t,2.5.4.46=q,ST=s,L=l"),
        ("CN=A,1.2.3.5=ia5\\,x", f"CN=A,1.2.3.5={TERM}22\\,5\\,105\\,97\\,53\\,44\\,120\\>\\>}}"),
        ("CN=A,STREET=str", f"CN=A,2.5.4.9={TERM}12\\,3\\,115\\,116\\,114\\>\\>}}"),
        ("CN=A,UID=abcdefghij", f'CN=A,UID={TERM}\\"\\\\f\\\\nabcdefghij\\"\\>\\>}}'),
        ('CN=A,UID=q\\"\\\\\\,abcdefgh', f'CN=A,UID={TERM}\\"\\\\f\\\\vq\\\\\\"\\\\\\\\\\,abcdefgh\\"\\>\\>}}'),
        ("CN=A,UID=日本", f"CN=A,UID={TERM}12\\,6\\,230\\,151\\,165\\,230\\,\\0A                 156\\,172\\>\\>}}"),
        ("CN=A,UID=" + "x" * 200, f"CN=A,UID={TERM}12\\,129\\,200" + "\\,120" * 200 + "\\>\\>}"),
        ("CN=A,O=Org,C=SE", "C=SE,O=Org,CN=A"),
        ("C = SE, O = Org, cn = A", "CN=A,O=Org,C=SE"),
        ("CN=A,O=Org  AB", "CN=A,O=org ab"),
    ],
)
def test_the_same_name_in_two_texts(recorded, shown):
    assert same_name(recorded, shown) is True
    assert same_name(shown, recorded) is True


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("CN=A", "CN=B"),
        ("CN=A", "OU=A"),
        ("CN=A", "CN=A,O=x"),
        ("CN=A,CN=A", "CN=A"),
        ("CN=A+O=x", "CN=A,O=x"),
        ("CN=A\\,O=x", "CN=A,O=x"),
        ("CN=A,O=a\\+b", "CN=A,O=a+OU=b"),
        ("CN=A,UID=x", f"CN=B,UID={TERM}48\\,0\\>\\>}}"),  # the unreadable part explains only one of two differences
        ("CN=A", f"CN=A,1.2.3={TERM}48\\,0\\>\\>}}"),
        ("CN=A,UID=x", f"CN=A,1.2.3={TERM}48\\,0\\>\\>}}"),
    ],
)
def test_another_name(one, other):
    assert same_name(one, other) is False
    assert same_name(other, one) is False


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, "CN=A"),
        ("", "CN=A"),
        ("A", "CN=A"),
        ('O="Acme, Inc"', "O=Acme\\, Inc"),  # RFC 1779
        ("CN=A,UID=x", f"CN=A,UID={TERM}48\\,0\\>\\>}}"),
        ("CN=A,UID=x", f'CN=A,UID={TERM}\\"\\\\f\\\\r\\DC\\,\\E9 unknown\\"/utf8\\>\\>}}'),
        ("CN=A,UID=#04024869", "CN=A,UID=Hi"),
        ("CN=A,UID=x,UID=y", f"CN=A,UID=y,UID={TERM}48\\,0\\>\\>}}"),
        ("CN=A,favouriteColour=red", "CN=A,1.2.3=red"),
        ("CN=A,O=\\FF", "CN=A,O=x"),
        ("CN=A,", "CN=A"),
    ],
)
def test_a_name_of_which_something_cannot_be_read_is_neither(one, other):
    assert same_name(one, other) is None
    assert same_name(other, one) is None


def test_a_long_name_that_cannot_be_read_takes_no_time():
    assert same_name("CN=" + "\\AA" * 20_000 + '"', "CN=A") is None


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("CN=APM0001", "APM0001"),
        ("O=Org,CN=APM0001", "APM0001"),
        ('SERIALNUMBER=SN-77,CN=APM0003,OU=Field \\"x\\",O=Acme\\, Inc,C=SE', "APM0003"),
        ("OU=x+SERIALNUMBER=SN 7+CN=APM0004,O=Org", "APM0004"),
        ("CN=APM0002,CN=APM0001", "APM0001,APM0002"),
        ("CN=a\\,b", "a,b"),
        ("CN=\\C3\\9C", "Ü"),
        ("O=CN\\, Inc", ""),
        ("CN=\\FF", None),
        ("CN=A,", None),
    ],
)
def test_the_common_name_of_a_subject(subject, name):
    assert common_name(subject) == name
