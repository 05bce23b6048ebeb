"""One declarative key map between our trees and PyTorch's files, read in both directions."""
