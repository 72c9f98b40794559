-- Instances whose lease ran out and whose claims are all given back.
delete from {schema}.instances i
using {schema}.ticker t
where t.tick - i.lease_tick > 31 and not exists (select from {schema}.claims c where c.instance_id = i.id)
