update penguinmails.campaigns set state = 'started', started_at = coalesce(started_at, now()) where id = %(id)s
