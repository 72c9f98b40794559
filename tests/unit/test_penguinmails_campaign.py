"""A campaign's file: what is read, what is refused and how it is said; and the configuration that is shipped."""

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from penguinmails import demo
from penguinmails.app import QUEUES, app
from penguinmails.campaign import CampaignError, Recipient, check_template, read_recipients
from penguinmails.settings import PACKAGED_TEMPLATES
from pmqd import config

DEMO = Path(demo.__file__).parent
SHIPPED = Path(__file__).parents[2] / "etc" / "penguinmails.toml"


def write(tmp_path: Path, text: str | bytes) -> Path:
    """A file with this text."""
    file = tmp_path / "people.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_columns_become_address_name_and_variables(tmp_path: Path) -> None:
    """A byte order mark, any order of columns, quotes and further columns are understood; the name may be missing."""
    text = (
        '\ufeffcity,name,email\r\n"Oslo, Norway","Ødegård, ""Å""",a@bücher.example\r\nRome,,b@example.com\r\n'
    )
    assert list(read_recipients(write(tmp_path, text)).people) == [
        Recipient("a@xn--bcher-kva.example", 'Ødegård, "Å"', {"city": "Oslo, Norway"}),
        Recipient("b@example.com", "", {"city": "Rome"}),
    ]
    assert read_recipients(write(tmp_path, "email\nx@example.com\n")).people == [
        Recipient("x@example.com", "", {})
    ]


def test_nobody_is_named_twice(tmp_path: Path) -> None:
    """The same address again, in other case or with spaces, is counted and left out; the first line stands."""
    recipients = read_recipients(
        write(tmp_path, "email,name\nA@example.com,One\n a@EXAMPLE.com ,Two\nb@example.com,\n")
    )
    assert [person.name for person in recipients.people] == ["One", ""]
    assert recipients.repeated == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\nAda\n", "no column `email`"),
        ("", r"no column `email` in its first line \(empty\)"),
        ("email,name\n", "no recipient"),
        ("email\nada\n", "line 2: 'ada' is not an e-mail address"),
        ("email,name\na@example.com\n", "line 2: not 2 columns"),
        ("email,name\na@example.com,A,B\n", "line 2: not 2 columns"),
        ("email\na@example.com\n\xff", "not a CSV file in UTF-8"),
        ('email\n"a@example.com\n', "not a CSV file"),
        ("email\n" + "x\n" * 30, "and 20 more"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Each fault is named with file and line; nothing of such a file is taken."""
    with pytest.raises(CampaignError, match=message):
        read_recipients(write(tmp_path, text.encode("latin-1")))
    with pytest.raises(CampaignError, match="No such file"):
        read_recipients(tmp_path / "nosuch.csv")


def test_a_template_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    """A variable that the file has no column for is found before anything is enqueued."""
    folder = tmp_path / "offer"
    folder.mkdir()
    for file, text in (
        ("subject.txt", "{{ city }}"),
        ("body.txt", "{{ name }}{{ nick | default(name) }}"),
        ("body.html", "{{ email }} {{ plan }}"),
    ):
        (folder / file).write_text(text)
    without = read_recipients(write(tmp_path, "email,city\na@example.com,Oslo\n"))
    with pytest.raises(CampaignError, match=r"uses {{ plan }}; the file has the columns city, email, name"):
        check_template(tmp_path, "offer", without)
    check_template(
        tmp_path, "offer", read_recipients(write(tmp_path, "email,city,plan\na@example.com,Oslo,gold\n"))
    )
    with pytest.raises(CampaignError, match="cannot be read"):
        check_template(tmp_path, "nosuch", without)


def test_the_recipients_of_the_demo() -> None:
    """1,000 different people whose names come in many scripts, and whom the packaged template serves."""
    recipients = read_recipients(DEMO / "recipients.csv")
    assert (len(recipients.people), recipients.repeated) == (1000, 0)
    beyond = Counter(not person.name.isascii() for person in recipients.people)
    assert beyond[True] > 500
    check_template(PACKAGED_TEMPLATES, "welcome", recipients)


def test_the_shipped_configuration_is_the_missions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queues in the mission's order with its timeouts, whole jobs in the lists, every status; only what has a handler is served."""
    settings = config.load(SHIPPED, environ={})
    assert (settings.redis.item, settings.redis.job_status) == ("full", "all")
    assert tuple(settings.queues) == QUEUES
    assert [settings.queues[name].timeout_seconds for name in QUEUES] == [60, 600, 30, 120, 60]
    migrator = settings.migrator
    assert (migrator.batch_size, migrator.poll_seconds, migrator.error_pause_seconds) == (100, 5, 10)
    served = [queue for pool in settings.workers for queue in pool.queues]
    assert sorted(served) == sorted(app.registry.queues())


def test_the_demo_runs_on_the_missions_configuration() -> None:
    """The demo's file differs from the shipped one in its drain time only."""
    shipped = tomllib.loads(SHIPPED.read_text())
    shown = tomllib.loads((DEMO / "pmqd.toml").read_text())
    assert {name: shown[name] for name in ("redis", "migrator")} == {
        name: shipped[name] for name in ("redis", "migrator")
    }
    assert config.load(DEMO / "pmqd.toml", environ={}).workers == config.load(SHIPPED, environ={}).workers
