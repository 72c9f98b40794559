import json, time, subprocess, sys
from tests.cli import pmqd
def test_x(daemon, database, connection, tmp_path):
    connection.execute("create role plainx login")
    f=tmp_path/"p.toml"; f.write_text(f'[postgres]\ndsn="{database}&user=plainx"\n')
    for c in (["jobs","list"],["enqueue","mails"],["schema","check"],["schema","apply"],["status"],["bench"],["doctor"]):
        r=pmqd(f,*c); print(c, r.returncode,r.stdout[:300], r.stderr)
    connection.execute("grant pmqd_enqueue to plainx")
    for c in (["jobs","list"],["enqueue","mails"],["status"]):
        r=pmqd(f,*c); print(c, r.returncode,r.stdout[:300], r.stderr)
    connection.execute("revoke pmqd_enqueue from plainx; drop role plainx")
    d = daemon({"workers": [{"name": "mail", "app": "tests.applications.trial:app", "processes": 2}]})
    j=tmp_path/"j.jsonl"
    j.write_text("\n".join('{"payload":{}, "kind":"nothing"}' for _ in range(100000)))
    t=time.time()
    print(pmqd(d.config, "enqueue","trial","--file",str(j)), time.time()-t)
    for _ in range(6): pmqd(d.config, "enqueue","trial",'{"seconds":1}',"--kind","nap","--priority","1")
    for _ in range(6):
        print([l for l in d.get("/metrics").text.splitlines() if "busy_ratio" in l or "workers{" in l], d.get("/healthz").text)
        time.sleep(.5)
    print(pmqd(d.config,"status").stdout)
    print(pmqd(d.config,"workers").stdout)
    print(d.log); assert 0
