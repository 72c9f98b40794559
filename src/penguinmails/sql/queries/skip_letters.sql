update penguinmails.deliveries
   set state = 'skipped', ended_at = clock_timestamp(), reason = 'the warm-up was stopped'
 where campaign_id = any(%(campaigns)s) and state in ('queued', 'deferred')
returning id
