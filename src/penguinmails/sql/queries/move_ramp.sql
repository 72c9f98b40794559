update penguinmails.warmup_ramps set volume = %(volume)s, state = %(state)s, updated_at = now() where account = %(account)s
