-- The claims that a rescue is about: of a dead worker, of a dead instance, or of all instances that are gone or whose lease ran out more
-- than a tick ago. All of `claims` is read: it holds only what is open.
select c.token, c.ids, c.worker_id, c.claimed_at
from {schema}.claims c left join {schema}.instances i on i.id = c.instance_id cross join {schema}.ticker t
where case %(scope)s
  when 'worker' then c.worker_id = %(worker_id)s
  when 'instance' then c.instance_id = %(instance_id)s
  else i.id is null or t.tick - i.lease_tick > 31 end
order by c.claimed_at, c.token
