"""The same six tasks done with ImagineLens and with its peers: who can, how right, at what cost."""
