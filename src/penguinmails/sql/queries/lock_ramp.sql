select start_volume, growth, ceiling, volume, state, time_zone, from_hour, to_hour, generation, now()
  from penguinmails.warmup_ramps where account = %(account)s for update
