update penguinmails.warmup_ramps set state = 'paused', generation = gen_random_uuid(), updated_at = now() where account = %(account)s
returning account
