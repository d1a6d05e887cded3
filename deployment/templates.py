"""Texts that go into kits: what to do, a site's own file to fill in, units for systemd."""

from string import Template

from .kit import KitFile

_SITE_README = Template("""\
# Kit of the site $name in the federation $federation

Nothing in here is secret until you have made your keys, and those stay in `keys/`: no key of yours
is ever sent to anybody.

1. Install Fedveil in the version that the federation agreed on, and put this folder where it is to
   stay, for instance `/srv/fedveil/kit`, owned by the user that is to run it.
2. `fedveil site keygen KIT` makes your keys in `KIT/keys/` and writes `KIT/request.json`.
3. Send `request.json` to the federation's authority, by any way. Read the fingerprint that keygen
   printed to them by telephone: they sign only what has the same.
4. Put the `answer.json` that they send back into this folder.
5. Edit `site.toml`: where your records are, what your columns are called, what you allow. It never
   leaves this machine, and it always wins.
6. `fedveil site check KIT` tries all of it, and changes nothing.
7. `fedveil site up KIT` takes part. `fedveil-site.service` does so for good, under systemd.

The site opens no port. It reaches $server, ports $fleet_port and $control_port, over TLS, and runs
only the Fedveil that is installed here. Back up `keys/` by itself, and of `state/` the ledger, the
newest copy only: an older one would let budget be spent twice, and it is noticed. Never back up
`state/secagg`. How, says docs/operations.md.

A key that was lost or seen by others: `fedveil site keygen KIT --rotate`, then steps 3 and 4 again.
""")

_SERVER_README = Template("""\
# Kit of the server of the federation $federation

Copy this folder to the server ($server) over a way that nobody else reads: it holds the server's
private keys. Then `fedveil server up KIT`, or `fedveil-server.service` under systemd.

It listens on ports $fleet_port (sites) and $control_port (all members), TLS on both. When a member
is added, rotated or revoked, put the authority's new `roster.json` in place of the one here; the
sites fetch it from the server by themselves. The authority's own folder does not belong here.
""")

_CALLER_README = Template("""\
# Kit of the $role $name in the federation $federation

It holds a private key: copy it over a way that nobody else reads, and keep it to yourself.

$use

The server is $server, port $control_port. If the key was lost or seen by others, tell the
federation's authority: `fedveil provision rotate` makes a new one, and the old one is refused.
""")

_USES = {
    "operator": "`fedveil submit RUN.toml --kit KIT` starts a run, `fedveil runs list --kit KIT` "
    "shows all of them.",
    "auditor": "`fedveil runs list --kit KIT` shows the runs, `fedveil runs fetch` takes one home "
    "to be audited.",
}

_SITE_TOML = Template("""\
# What the site $name is and allows. It never leaves the site, and it always wins.
# Paths are relative to this file.

[site]
name = "$name"
data = "data/records.csv"                  # your records: CSV, Parquet, npz or a folder of images
ledger = "state/ledger.sqlite"             # what was spent; it outlives every run
keys = "keys"

# What the federation calls a column = what it is called in your file; none is needed if they agree.
# [map]
# age = "alter"
# systolic = "bp_sys"

[policy]
dataset_id = "$name-records"  # the account: the same for as long as the data is
epsilon_lifetime = 10.0                    # over all runs, for ever: decide before the first one
delta_lifetime = 1e-5
# epsilon_per_run = 4.0
min_sites = 3                              # smallest secure sum to take part in
min_uploaders = 3
min_t_collude = 1
mechanisms = ["distributed", "site"]
encryption = ["secagg"]
max_parameters = 50000000                  # what a model may take of this machine's memory
coordinator = "$coordinator"  # who must have signed a run
approval = "automatic"                     # a run that all of this allows needs nobody's say
""")

_UNIT = Template("""\
# Put it into /etc/systemd/system/, change User, both paths of the kit and the program's, then
# `systemctl daemon-reload && systemctl enable --now $unit`.
[Unit]
Description=Fedveil $role $name of the federation $federation
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
User=fedveil
ExecStart=/opt/fedveil/bin/fedveil $role up /srv/fedveil/kit
Restart=always
RestartSec=10
# A wrong kit or file: starting again would not mend it.
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=60
UMask=0077

NoNewPrivileges=yes
MemoryMax=80%
ProtectSystem=strict
ReadWritePaths=/srv/fedveil/kit
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
CapabilityBoundingSet=
AmbientCapabilities=

[Install]
WantedBy=multi-user.target
""")


def texts(about: KitFile) -> dict[str, str]:
    """The files of a kit that are for people, by name."""
    known = about.model_dump()
    if about.role == "site":
        return {
            "README.md": _SITE_README.substitute(known),
            "site.toml": _SITE_TOML.substitute(known),
            "fedveil-site.service": _UNIT.substitute(known, unit="fedveil-site.service"),
        }
    if about.role == "server":
        return {
            "README.md": _SERVER_README.substitute(known),
            "fedveil-server.service": _UNIT.substitute(known, unit="fedveil-server.service"),
        }
    return {"README.md": _CALLER_README.substitute(known, use=_USES[about.role])}
