package wire

// The limits of what a frame may hold. A length from the wire is compared with
// them before anything is allocated for it; the encoder keeps to them too.
const (
	// EntryPayloadMax is the largest payload of one entry, request or reply:
	// the largest that NBD allows a client to send.
	EntryPayloadMax = 32 << 20
	// FramePayloadMax bounds all payloads of a frame together: one largest
	// entry after as many smaller ones as a sender likes to batch.
	FramePayloadMax = 64 << 20
	// FrameEntriesMax bounds the entries of an Append.
	FrameEntriesMax = 4096
	// FrameBlocksMax bounds the extents of a Blocks.
	FrameBlocksMax = 4096
	// HistoryMax bounds the epochs of a Reject. Each costs an operator's or a
	// controller's command, and a log keeps only those that it has entries of.
	HistoryMax = 16384
	// FrameBodyMax bounds a body: room for the largest number of entries.
	FrameBodyMax = 1 << 20
	// NameMax is the longest name of a node or cluster in bytes.
	NameMax = 255
	// ExtentsMax bounds the extents of one block status answer.
	ExtentsMax = 32768
	// HelloMax bounds what follows a hello's fixed part.
	HelloMax = 2048
	// readBuffer is what a Reader holds: some 60 frames of 4 KiB in one read.
	readBuffer = 256 << 10
	// directRead is the rest of a payload from which on it is read straight
	// into its own buffer; less than that is cheaper to read along with what
	// follows it and to copy.
	directRead = 32 << 10
	// leanAhead is what is read beyond what is asked for after a large payload:
	// headers, and not much of the next payload, which would have to be copied.
	leanAhead = 4 << 10
	// keepEntries is the capacity up to which a recycled message keeps its
	// slice of entries or blocks, so that a rare large one is not kept for ever.
	keepEntries = 256
)
