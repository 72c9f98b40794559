insert into penguinmails.warmup_ramps (account, start_volume, growth, ceiling, volume, time_zone, from_hour, to_hour)
values (%(account)s, %(start)s, %(growth)s, %(ceiling)s, %(volume)s, %(time_zone)s, %(from_hour)s, %(to_hour)s)
on conflict (account) do update
   set start_volume = excluded.start_volume, growth = excluded.growth, ceiling = excluded.ceiling, volume = excluded.volume,
       time_zone = excluded.time_zone, from_hour = excluded.from_hour, to_hour = excluded.to_hour,
       state = 'ramping', generation = gen_random_uuid(), updated_at = now()
