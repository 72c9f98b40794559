-- A new instance, or other pools of one that lives (a reload): that renews no lease, which may have run out.
insert into {schema}.instances as i (id, host, pid, lease_tick, queues, kinds, pools)
select %(instance_id)s, %(host)s, %(pid)s, t.tick, %(queues)s::text[], %(kinds)s::text[], %(pools)s::jsonb from {schema}.ticker t
on conflict (id) do update set queues = excluded.queues, kinds = excluded.kinds, pools = excluded.pools
