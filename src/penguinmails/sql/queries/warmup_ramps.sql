-- Each ramp, the newest day that is planned, and the newest decision.
select r.account, r.state, r.volume, r.time_zone, r.from_hour, r.to_hour, n.day, n.planned, d.decision, d.reason
  from penguinmails.warmup_ramps r
  left join lateral (select day, planned from penguinmails.warmup_days where account = r.account order by day desc limit 1) n on true
  left join lateral (select decision, reason from penguinmails.warmup_days
                      where account = r.account and decision is not null order by day desc limit 1) d on true
 order by r.account
