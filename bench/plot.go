package main

import (
	"fmt"
	"html"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Curve is what a plot shows.
type Curve struct {
	// File is the plot's name without the extension.
	File  string `json:"file"`
	Title string `json:"title"`
	// X and Y name the axes, with their units.
	X      string   `json:"x"`
	Y      string   `json:"y"`
	Series []Series `json:"series"`
	// Target is a value of Y, 0 for none.
	Target float64 `json:"target,omitempty"`
}

// Series is one line of a plot.
type Series struct {
	Name string    `json:"name"`
	X    []float64 `json:"x"`
	Y    []float64 `json:"y"`
}

// slope is that of the straight line that fits best (least squares), NaN for fewer
// than two places.
func (s Series) slope() float64 {
	n := float64(len(s.X))
	var sx, sy, sxx, sxy float64
	for i := range s.X {
		sx, sy = sx+s.X[i], sy+s.Y[i]
		sxx, sxy = sxx+s.X[i]*s.X[i], sxy+s.X[i]*s.Y[i]
	}
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}

// Pixels of a plot, and of what is around its axes.
const (
	plotWidth, plotHeight                = 720, 320
	marginLeft, marginRight              = 64, 16
	marginTop, marginBottom              = 74, 48
	innerWidth                           = plotWidth - marginLeft - marginRight
	innerHeight                          = plotHeight - marginTop - marginBottom
	ticksX, ticksY                       = 8, 5
	pointsUpTo                           = 40 // more are a line only
	plotFont, plotFontSize, legendSwatch = "system-ui, sans-serif", 13, 14
)

// seriesClasses are the colours, of which the style has a light and a dark set
// (Okabe and Ito's, which colour-blind people can tell apart).
const plotStyle = `
text { font: %dpx %s; fill: #1f2328 }
.title { font-weight: 600 }
.axis { stroke: #59636e; fill: none }
.grid { stroke: #d1d9e0; fill: none }
.target { stroke: #cf222e; stroke-dasharray: 6 4; fill: none }
.s0 { color: #0072b2 } .s1 { color: #d55e00 } .s2 { color: #009e73 } .s3 { color: #aa4499 }
.line { stroke: currentColor; stroke-width: 2; fill: none; stroke-linejoin: round }
.dot { fill: currentColor }
.back { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .axis { stroke: #9198a1 } .grid { stroke: #3d444d } .target { stroke: #f85149 } .back { fill: #0d1117 }
.s0 { color: #56b4e9 } .s1 { color: #e69f00 } .s2 { color: #2fc79b } .s3 { color: #dd99dd }
}
`

// svg draws the curve.
func (c Curve) svg(out io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" role="img" aria-label="%s">`+"\n", plotWidth, plotHeight, html.EscapeString(c.Title))
	fmt.Fprintf(&b, "<style>"+plotStyle+"</style>\n", plotFontSize, plotFont)
	fmt.Fprintf(&b, `<rect class="back" width="%d" height="%d"/>`+"\n", plotWidth, plotHeight)
	maxX, maxY := 0.0, c.Target
	for _, s := range c.Series {
		if len(s.X) != len(s.Y) || len(s.X) == 0 {
			return fmt.Errorf("plot %s: %q has %d places and %d values", c.File, s.Name, len(s.X), len(s.Y))
		}
		maxX, maxY = max(maxX, slices.Max(s.X)), max(maxY, slices.Max(s.Y))
	}
	stepX, stepY := tickStep(maxX, ticksX), tickStep(maxY, ticksY)
	topY := stepY * math.Ceil(maxY/stepY)
	endX := max(maxX, stepX)
	x := func(v float64) float64 { return marginLeft + innerWidth*v/endX }
	y := func(v float64) float64 { return marginTop + innerHeight*(1-max(v, 0)/topY) }
	text := func(class, anchor string, px, py float64, s string) {
		fmt.Fprintf(&b, `<text class="%s" text-anchor="%s" x="%.1f" y="%.1f">%s</text>`+"\n", class, anchor, px, py, html.EscapeString(s))
	}
	line := func(class string, x1, y1, x2, y2 float64) {
		fmt.Fprintf(&b, `<path class="%s" d="M%.1f %.1fL%.1f %.1f"/>`+"\n", class, x1, y1, x2, y2)
	}
	text("title", "start", marginLeft, 18, c.Title)
	for i := 0; float64(i)*stepY <= topY+stepY/2; i++ {
		v := float64(i) * stepY
		line("grid", marginLeft, y(v), plotWidth-marginRight, y(v))
		text("tick", "end", marginLeft-6, y(v)+4, tickLabel(v, stepY))
	}
	for i := 0; float64(i)*stepX <= endX; i++ {
		v := float64(i) * stepX
		line("axis", x(v), y(0), x(v), y(0)+4)
		text("tick", "middle", x(v), y(0)+18, tickLabel(v, stepX))
	}
	line("axis", marginLeft, y(0), plotWidth-marginRight, y(0))
	text("name", "middle", marginLeft+innerWidth/2, plotHeight-8, c.X)
	fmt.Fprintf(&b, `<text class="name" text-anchor="middle" transform="translate(14 %d) rotate(-90)">%s</text>`+"\n", marginTop+innerHeight/2, html.EscapeString(c.Y))
	if c.Target > 0 {
		line("target", marginLeft, y(c.Target), plotWidth-marginRight, y(c.Target))
		text("name", "end", plotWidth-marginRight, y(c.Target)-5, "target")
	}
	at, row := float64(marginLeft), 36.0
	for i, s := range c.Series {
		width := legendSwatch + 22 + 0.52*plotFontSize*float64(len(s.Name))
		if at+width > plotWidth && at > marginLeft {
			at, row = marginLeft, row+18
		}
		fmt.Fprintf(&b, `<g class="s%d"><path class="line" d="`, i%4)
		for j := range s.X {
			fmt.Fprintf(&b, "%c%.1f %.1f", "ML"[min(j, 1)], x(s.X[j]), y(s.Y[j]))
		}
		fmt.Fprint(&b, `"/>`)
		if len(s.X) <= pointsUpTo {
			for j := range s.X {
				fmt.Fprintf(&b, `<circle class="dot" cx="%.1f" cy="%.1f" r="3"/>`, x(s.X[j]), y(s.Y[j]))
			}
		}
		fmt.Fprintf(&b, `<path class="line" d="M%.1f %.0fh%d"/></g>`+"\n", at, row, legendSwatch)
		text("name", "start", at+legendSwatch+5, row+4, s.Name)
		at += width
	}
	fmt.Fprintln(&b, "</svg>")
	_, err := io.WriteString(out, b.String())
	return err
}

// tickStep is 1, 2 or 5 times a power of ten, so that about n steps reach the end.
func tickStep(end float64, n int) float64 {
	if end <= 0 {
		return 1
	}
	raw := end / float64(n)
	power := math.Pow(10, math.Floor(math.Log10(raw)))
	for _, m := range []float64{1, 2, 5} {
		if m*power >= raw {
			return m * power
		}
	}
	return 10 * power
}

func tickLabel(v, step float64) string {
	return fmt.Sprintf("%.*f", max(0, int(math.Ceil(-math.Log10(step)-1e-9))), v)
}

// savePlots writes a file for each curve.
func savePlots(dir string, curves []Curve) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("save the plots: %w", err)
	}
	for _, c := range curves {
		var b strings.Builder
		if err := c.svg(&b); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, c.File+".svg"), []byte(b.String()), 0o644); err != nil {
			return fmt.Errorf("save the plots: %w", err)
		}
	}
	return nil
}
