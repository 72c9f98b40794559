"""What every test may use; the fixtures themselves stand in fix_*.py."""

import hypothesis

pytest_plugins = [
    "tests.fix_servers",
    "tests.fix_store",
    "tests.fix_proxy",
    "tests.fix_daemon",
    "tests.fix_redis_ha",
    "tests.fix_postgres_ha",
    "tests.fix_network",
]

# How long one example takes says more about the machine than about the code; pytest's own limit ends what hangs.
hypothesis.settings.register_profile("pmqd", deadline=None)
hypothesis.settings.load_profile("pmqd")
