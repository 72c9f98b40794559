"""Paths that lead elsewhere: links, `..`, folders that others may write in, and files that are no files."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pmqd import config, listener, recovery, served, statedir
from pmqd.errors import ConfigError
from pmqd.recovery import (
    SavedSettlesError,
    counted_claim,
    forget_counted,
    keep_counted,
    load_outcomes,
    save_outcomes,
    saved_settles,
    settles_path,
)
from pmqd.settings import PoolSettings, Settings
from tests.fix_daemon import MakeDaemon
from tests.history import enqueue
from tests.security.outcomes import an_outcome

WHO_ELSE = 54321


def as_link(path: Path) -> None:
    """state_dir is a link to a folder of ours."""
    (path.parent / "real").mkdir(mode=0o700)
    path.symlink_to(path.parent / "real")


def as_link_to_nowhere(path: Path) -> None:
    """A link whose end does not exist yet: whoever makes it owns it."""
    path.symlink_to(path.parent / "nowhere")


def as_file(path: Path) -> None:
    """A plain file."""
    path.write_text("")


def as_open_folder(path: Path) -> None:
    """A folder that all may write in."""
    path.mkdir()
    path.chmod(0o777)


def as_group_folder(path: Path) -> None:
    """A folder that a group may write in."""
    path.mkdir()
    path.chmod(0o770)


def as_sticky_folder(path: Path) -> None:
    """Like /tmp itself: others may put things in."""
    path.mkdir()
    path.chmod(0o1777)


def in_open_parent(path: Path) -> None:
    """Our own folder where everybody may put another in its place."""
    path.mkdir(mode=0o700)
    path.parent.chmod(0o777)


def as_others_folder(path: Path) -> None:
    """Another user made it before us."""
    path.mkdir(mode=0o700)
    try:
        os.chown(path, WHO_ELSE, WHO_ELSE)
    except PermissionError:
        pytest.skip("only root can give a folder away")


def with_lock_link(path: Path) -> None:
    """The lock is a link to a file that would be locked, or made, elsewhere."""
    path.mkdir(mode=0o700)
    (path / "lock").symlink_to(path.parent / "elsewhere")


def with_lock_folder(path: Path) -> None:
    """The lock is a folder."""
    (path / "lock").mkdir(parents=True, mode=0o700)


def with_metrics_link(path: Path) -> None:
    """The metric files' folder is a link: emptying it would empty something else."""
    path.mkdir(mode=0o700)
    (path / "metrics").symlink_to(path.parent / "victim")


@pytest.mark.parametrize(
    "plant",
    [
        as_link,
        as_link_to_nowhere,
        as_file,
        as_open_folder,
        as_group_folder,
        as_sticky_folder,
        in_open_parent,
        as_others_folder,
        with_lock_link,
        with_lock_folder,
        with_metrics_link,
    ],
)
def test_path_traversal_state_dir_of_others_is_refused(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    """Each is a configuration error that names the folder; nothing outside it is made, locked or removed."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "victim").mkdir()
    (tmp_path / "base" / "victim" / "kept").write_text("kept")
    path = tmp_path / "base" / "state"
    plant(path)
    with pytest.raises(ConfigError, match="state_dir"):
        statedir.open_state_dir(path, patience=0.1)
    assert (tmp_path / "base" / "victim" / "kept").read_text() == "kept"
    assert not (tmp_path / "base" / "elsewhere").exists()


def test_path_traversal_what_is_made_is_ours_alone(tmp_path: Path) -> None:
    """Folders 0700 and the lock 0600, whatever the umask lets through."""
    before = os.umask(0)
    try:
        made = statedir.open_state_dir(tmp_path / "state")
        save_outcomes(settles_path(tmp_path / "state", "h:i:w1.1"), [an_outcome()], [])
        served.tell(tmp_path / "state", "p", ["q"], ["k"])
        made.close()
    finally:
        os.umask(before)
    for folder in (".", "metrics", "settles", "served"):
        assert (tmp_path / "state" / folder).stat().st_mode & 0o777 == 0o700, folder
    assert (tmp_path / "state" / "lock").stat().st_mode & 0o777 == 0o600


def test_path_traversal_dots_in_state_dir_are_resolved(tmp_path: Path) -> None:
    """`..` in the setting names the folder that it names: the checks are made on that."""
    (tmp_path / "a").mkdir(mode=0o777)
    (tmp_path / "a").chmod(0o777)
    made = statedir.open_state_dir(tmp_path / "a" / ".." / "state")
    made.close()
    with pytest.raises(ConfigError, match="every user may replace it"):
        statedir.open_state_dir(tmp_path / "a" / "b" / ".." / "state")


def test_path_traversal_names_of_workers_and_pools_stay_in_the_folder(tmp_path: Path) -> None:
    """A worker's id and a pool's name become parts of file names: neither can lead out."""
    for name in ("../../x", "/etc/x", "a/b:c", "..", "h:i:w0.1"):
        assert settles_path(tmp_path, name).parent == tmp_path / recovery.SETTLES
    for name in ("../x", "a/b", ".", "..", "", "a\0b", "x" * 33):
        with pytest.raises(ValueError, match="name"):
            PoolSettings(name=name, app="a:b")


# --- files that jobs may have replaced: they run as the same user --------------------------------------------


def plant_link(path: Path) -> None:
    """A link to a sound file elsewhere."""
    elsewhere = path.parent.parent / "elsewhere.jsonl"
    save_outcomes(elsewhere, [an_outcome()], [])
    path.symlink_to(elsewhere)


def plant_pipe(path: Path) -> None:
    """A pipe: to open it would wait for ever."""
    os.mkfifo(path)


def plant_endless(path: Path) -> None:
    """A link to a file without end."""
    path.symlink_to("/dev/zero")


def plant_folder(path: Path) -> None:
    """A folder."""
    path.mkdir()


def plant_socket(path: Path) -> None:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


PLANTS = [plant_link, plant_pipe, plant_endless, plant_folder, plant_socket]


@pytest.mark.parametrize("plant", PLANTS)
def test_path_traversal_planted_settles_are_not_read(
    short_folder: Path, plant: Callable[[Path], None]
) -> None:
    """What is no plain file of this user is an error at once: it neither waits nor reads something else."""
    (short_folder / "settles").mkdir()
    plant(short_folder / "settles" / "x.jsonl")
    [path] = saved_settles(short_folder)
    with pytest.raises((OSError, SavedSettlesError)):
        load_outcomes(path)
    recovery.put_aside(path, OSError("planted"))
    assert saved_settles(short_folder) == []


@pytest.mark.parametrize("plant", PLANTS)
def test_path_traversal_a_planted_counted_claim_is_neither_read_nor_followed(
    short_folder: Path, plant: Callable[[Path], None]
) -> None:
    """It says nothing, nobody waits for it, what it leads to stays as it is; and the next count takes its place, but for a folder's."""
    state = short_folder / "state"
    state.mkdir()
    path = state / recovery.COUNTED
    plant(path)
    led_to = path.read_bytes() if plant is plant_link else b""
    assert counted_claim(state) is None
    token = uuid4()
    keep_counted(state, token, [])
    assert counted_claim(state) == (None if plant is plant_folder else (token, []))
    forget_counted(state)
    if plant is plant_link:
        assert (short_folder / "elsewhere.jsonl").read_bytes() == led_to != b""


@pytest.mark.parametrize("plant", PLANTS)
def test_path_traversal_planted_words_of_pools_are_not_read(
    short_folder: Path, plant: Callable[[Path], None]
) -> None:
    """The same for what workers say that they serve, and for the identity of the family before."""
    (short_folder / "served").mkdir()
    plant(short_folder / "served" / "p.json")
    plant_json = short_folder / "served" / "q.json"
    plant_json.write_text('{"queues": [1, {}], "kinds": "abc"}')
    assert served.read(short_folder) == {}
    (short_folder / "state" / "instances").mkdir(mode=0o700, parents=True)
    (short_folder / "state").chmod(0o700)
    plant(short_folder / "state" / "instances" / "x")
    made = statedir.open_state_dir(short_folder / "state")
    assert made.previous == ()
    made.close()


def test_path_traversal_a_daemon_survives_planted_files(daemon: MakeDaemon, connection: object) -> None:
    """Maintenance meets all of them in a running instance, puts them aside, and the instance goes on rescuing."""
    running = daemon()
    folder = Path(running.settings["state_dir"]) / "settles"
    folder.mkdir(exist_ok=True)
    for number, plant in enumerate(PLANTS[1:]):
        plant(folder / f"x{number}-1.jsonl")
    (folder / "y-1.jsonl").write_bytes(b"[" * 100_000)
    (folder / "z-1.jsonl").write_text('{"job_id": 1}\n')
    import psycopg

    with psycopg.connect(running.settings["postgres"]["dsn"], autocommit=True) as looking:
        crashed = enqueue(looking, "os_exit", attempts=1)
        import tests.fix_servers as servers

        servers.wait_until(
            lambda: (
                looking.execute("select status from pmqd.jobs where id = %s", [crashed]).fetchone()
                == ("failed",)
            ),
            20,
            "the dead worker's job is given back",
        )
        servers.wait_until(lambda: not list(folder.glob("*.jsonl")), 20, "all are put aside")


# --- the configuration file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "told"), [(0o600, ""), (0o640, ""), (0o602, "may change it"), (0o666, "may change it")]
)
def test_path_traversal_a_configuration_that_others_may_write_is_told(
    tmp_path: Path, mode: int, told: str
) -> None:
    """Whoever writes there chooses the code that runs: `pmqd check` warns."""
    path = tmp_path / "pmqd.toml"
    path.write_text('[postgres]\ndsn = "host=x"\n')
    path.chmod(mode)
    found = [line for line in config.warnings(config.load(path, environ={}), path) if "may change it" in line]
    assert bool(found) == bool(told)


@pytest.mark.parametrize("path", ["a\0b", "/nonexistent/../etc", "", "/dev/null/x", "/proc/self/mem"])
def test_path_traversal_odd_configuration_files_are_one_error(path: str) -> None:
    """A path that leads nowhere, or to something that is no text, is a configuration error."""
    if not path:
        return
    with pytest.raises(ConfigError):
        config.load(Path(path), environ={})


def test_path_traversal_state_dir_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder means the one where the daemon was started, also after something changed the directory."""
    monkeypatch.chdir(tmp_path)
    assert Settings.model_validate({"state_dir": "state"}).state_dir == tmp_path / "state"


def test_path_traversal_an_identity_is_a_name_of_ours(tmp_path: Path) -> None:
    """What stands in `instances` under another name than a UUID is nobody's; what is in the file is never read."""
    folder = tmp_path / "state" / "instances"
    folder.mkdir(parents=True)
    (tmp_path / "state").chmod(0o700)
    for name in ("x" * 200, "..x", "%2e%2e", str(UUID(int=7))):
        (folder / name).write_text("../../etc")
    made = statedir.open_state_dir(tmp_path / "state")
    assert made.previous == (UUID(int=7),)
    made.close()


@pytest.mark.parametrize("address", ["/run/pmqd.sock", "unix:/x", "0.0.0.0", ":80", "[::1:80", "localhost:0"])
def test_path_traversal_listen_addresses_are_addresses(address: str) -> None:
    """No path is taken for an address."""
    with pytest.raises(ValueError, match=r"web\.listen"):
        Settings.model_validate({"web": {"listen": address}})


def test_path_traversal_a_port_in_use_is_a_configuration_error() -> None:
    """It is told by the setting's name, before anything is forked."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"web\.listen"):
            listener.listen(address)
