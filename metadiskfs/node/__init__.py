"""The other end: a node that answers every client written for the 2014-15 servers."""
