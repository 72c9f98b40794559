"""What every test may use; the fixtures themselves stand in fix_*.py."""

pytest_plugins = [
    "tests.fix_servers",
    "tests.fix_proxy",
    "tests.fix_daemon",
    "tests.fix_redis_ha",
    "tests.fix_postgres_ha",
    "tests.fix_network",
]
