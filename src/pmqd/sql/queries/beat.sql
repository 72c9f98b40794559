-- Once a second per instance: lease, tick, pulse, and what is to be done.
select lost, ticking, tick, claim_workers, cancel_ids, cancel_tokens, orphans, pulse, now_epoch, claims_in, claim_tokens
from {schema}.beat(%(instance_id)s, %(holding)s, %(stalled_tick)s, %(lossless)s)
