// Package peer has the links between nodes. A Manager keeps one link to each
// peer; a link carries the messages of package wire for all volumes.
//
// # Connections
//
// Each node dials each peer. The connection that a node dialed carries what it
// sends and nothing else, so there are two connections between two nodes, and
// never a question which of two to keep. The acceptor sends one thing, its
// answer to the handshake. A newer connection from a peer replaces the older
// one, and what the older one still holds is dropped unread.
//
// # Sending
//
//  1. Send, any goroutine: encodes header and body into the slab of the
//     stream's queue, and queues the payloads by reference.
//  2. Flush, any goroutine: if nobody is writing, writes a round itself,
//     without waiting for the socket; whoever is writing takes along what was
//     queued meanwhile.
//  3. runSender, one a connection: writes what did not go out at once.
//
// A round takes the control lane first (pings, a secondary's answers, requests
// for a lease), then small messages, then bulk, about roundBytes in all, but at
// least one frame of each. So no more than that stands between a ping and the
// socket, and one volume's resync does not delay another volume's writes.
//
// # Receiving
//
// One goroutine a connection reads with a large buffer, decodes every frame
// that is whole in it, and hands them to the Handler in one call.
//
// # Loss
//
// What is sent over a link that is up arrives in order, or the link goes down
// and says so (Handler.Down) before it comes up again. A link goes down when its
// connection breaks, when the peer closes it or comes back as another process,
// when sent data is not acknowledged for Options.Lease, and when the queue
// overflows. Nothing is sent again by this package.
package peer
