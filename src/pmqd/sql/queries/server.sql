-- Whom a connection has reached: another process than the one it was told of means a pooler; the cluster and its timeline.
select pg_backend_pid(), {schema}.cluster(), {schema}.timeline()
