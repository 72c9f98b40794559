"""What `pmqd demo` shows: a campaign, its recipients, and a server that receives it."""
