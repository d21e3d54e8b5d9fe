# Read by the other scripts: where this network's files are and who does what in it.
# FEDCMT_NETWORK names another folder than workspace/network.
umask 077 # the kits hold private keys
network=${FEDCMT_NETWORK:-workspace/network}
kits=$network/kits
admin=$kits/admin@fedcmt.example
lead=$kits/lead@fedcmt.example
