select d.id, d.campaign_id, d.email, d.attempted_at, d.reason
  from penguinmails.deliveries d
 where d.campaign_id = any(array(select t.campaign_id from penguinmails.campaign_totals t where t.state = 'held' and t.deliveries > 0))
   and d.state = 'held' and (%(campaign)s::uuid is null or d.campaign_id = %(campaign)s)
 order by d.attempted_at, d.id
