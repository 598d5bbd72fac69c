"""Pairs, prediction ~ gold, by kind: EQUAL answers written differently, and DIFFERENT ones that look alike."""

EQUAL = r"""
# numbers
42 ~ 42.0
+7 ~ 7
007 ~ 7
.5 ~ 0.5
-.25 ~ -\frac14
3. ~ 3
1,234,567 ~ 1234567
1 234 567 ~ 1234567
1{,}000 ~ 1000
12,\!345 ~ 12345
1\,000\,000 ~ 10^6
2.50 ~ 2.5
6.02\times10^{23} ~ 6.02 \cdot 10^{23}
1.2 \times 10^{-3} ~ 0.0012
3 \cdot 10^4 ~ 30000
5 million ~ 5,000,000
1.5 billion ~ 1500000000
−3 ~ -3
0.\overline{6} ~ \frac{2}{3}
0.1\overline{6} ~ 1/6
2^{16} ~ 65536
7! ~ 5040
\binom{6}{2} ~ 15
{10 \choose 3} ~ 120
3 \times 5^2 ~ 75
|-8| ~ 8
\lfloor 3.7 \rfloor ~ 3
\sqrt{49} ~ 7
\sqrt[3]{27} ~ 3
27^{1/3} ~ 3
\log_2 32 ~ 5
\ln e^4 ~ 4
# fractions
\dfrac{3}{4} ~ \frac{3}{4}
\tfrac34 ~ 3/4
\frac{6}{8} ~ \frac34
0.75 ~ \frac{3}{4}
-\frac{2}{7} ~ \frac{-2}{7}
\frac{2}{-7} ~ -\frac{2}{7}
\frac{-2}{-7} ~ 2/7
2\frac13 ~ \frac73
2 1/3 ~ \frac{7}{3}
-1\frac{1}{2} ~ -1.5
½ ~ 0.5
1\div 8 ~ 0.125
\frac{1}{\sqrt2} ~ \frac{\sqrt{2}}{2}
\frac{5}{\sqrt{5}} ~ \sqrt5
\frac 7 9 ~ \frac{7}{9}
\frac{1,000}{3} ~ 1000/3
# rounding, to six digits
0.333333 ~ \frac13
0.6666667 ~ \frac{2}{3}
0.666666 ~ \frac{2}{3}
1.414214 ~ \sqrt2
3.14159265 ~ \pi
# roots and powers
2\sqrt{5} ~ \sqrt{20}
\sqrt{8}+\sqrt{2} ~ 3\sqrt2
\sqrt{3+2\sqrt{2}} ~ 1+\sqrt{2}
\frac{1}{2-\sqrt3} ~ 2+\sqrt{3}
2^{1/2} ~ \sqrt{2}
\sqrt 6 ~ \sqrt{6}
sqrt(6) ~ \sqrt{6}
√6 ~ \sqrt{6}
5^{-2} ~ 0.04
x^{-1} ~ \frac1x
(x^3)^2 ~ x^6
\sqrt[4]{x^3} ~ x^{3/4}
# algebra
(x-1)(x+1) ~ x^2-1
2x+3y ~ 3y + 2x
\frac{x+1}{2} ~ 0.5x + 0.5
x(x-2) ~ x^2 - 2x
-(a-b) ~ b-a
\frac{a^2-b^2}{a-b} ~ a+b
4/3 - 7x/6 ~ \frac{8-7x}{6}
n(n+1)/2 ~ \frac{n^2+n}{2}
2 \cdot 3^{n-1} ~ \frac{2}{3} \cdot 3^n
2^{n+1} ~ 2\cdot 2^n
(2k)^2 ~ 4k^2
\frac{n!}{(n-2)!} ~ n(n-1)
\binom{n}{2} ~ \frac{n(n-1)}{2}
1-\frac{1}{n+1} ~ \frac{n}{n+1}
\frac{x}{y/z} ~ \frac{xz}{y}
a_1 + d ~ d + a_{1}
x^2y ~ yx^2
xy ~ yx
# functions
\sin^2\theta + \cos^2\theta ~ 1
\sin 2x ~ 2\sin x\cos x
\tan x ~ \frac{\sin x}{\cos x}
\cos(2x) ~ 1-2\sin^2 x
\ln 8 ~ 3\ln 2
\log_4 7 ~ \frac{\ln 7}{\ln 4}
\log 1000 ~ 3
e^{\ln 5} ~ 5
\arcsin\frac12 ~ \frac{\pi}{6}
\sin^{-1}(1) ~ \frac{\pi}{2}
\tan 45^\circ ~ 1
\cos 60° ~ 1/2
\sinh x ~ \frac{e^x-e^{-x}}{2}
\cot x ~ \frac{1}{\tan x}
sin(x) ~ \sin x
\exp(2x) ~ e^{2x}
# complex numbers
3-4i ~ -4i+3
i^2 ~ -1
(1+i)^2 ~ 2i
\frac{1}{i} ~ -i
2+\mathrm{i} ~ i+2
\frac{1+i\sqrt3}{2} ~ \frac12+\frac{\sqrt{3}}{2}i
e^{i\pi} ~ -1
\sqrt{-4} ~ 2i
# pi
2π ~ 2\pi
\frac{3}{2}\pi ~ \frac{3\pi}{2}
pi/4 ~ \frac{\pi}{4}
\pi\cdot 16 ~ 16\pi
36\pi\text{ cm}^3 ~ 36\pi
# named values
x=5 ~ 5
5 ~ x = 5
n = 2^{10} ~ 1024
x = \frac{10}{4} = 2.5 ~ 5/2
f(x) = x^2+1 ~ x^2+1
y=3x-2 ~ f(x)=3x-2
a_n=2n-1 ~ 2n - 1
S = \frac{1}{2} ~ 0.5
x \approx 2.71 ~ 2.71
\approx 8 ~ 8
7 = x ~ x=7
\angle ABC = 30^\circ ~ \angle ABC = 30
\theta = 45^{\circ} ~ 45
(x,y)=(1,-2) ~ (1,-2)
(1,-2) ~ (x, y) = (1, -2)
x=1,\ y=-2 ~ (1,-2)
x = 3 \text{ and } y = 4 ~ y=4, x=3
# equations
2x+4y=6 ~ x+2y=3
y = 2x+1 ~ 2x - y + 1 = 0
x^2+y^2=25 ~ x^2 + y^2 - 25 = 0
\frac{x^2}{4}+\frac{y^2}{9}=1 ~ 9x^2+4y^2=36
3 = x+y ~ x+y=3
-x-y=-3 ~ x + y = 3
y-1=2(x-3) ~ y=2x-5
# lists
1, 2, 3 ~ 3,2,1
-1,4 ~ 4, -1
1 \text{ and } 2 ~ 1,2
1 and 2 ~ 2, 1
3 \text{ or } -3 ~ \pm 3
x=3 \text{ or } x=-3 ~ \pm 3
x = \pm 3 ~ 3,-3
2\pm\sqrt3 ~ 2-\sqrt{3},2+\sqrt{3}
\frac{1\pm\sqrt5}{2} ~ \frac{1+\sqrt{5}}{2}, \frac{1-\sqrt{5}}{2}
1,2,\text{ and }4 ~ 1,2,4
0.5, 0.25 ~ \frac14, \frac12
1; 2; 3 ~ 1,2,3
n = 1, 2, 3 ~ 1,2,3
\pm\frac{\sqrt{2}}{2} ~ \pm \frac{1}{\sqrt2}
# sets
\{1,2\} ~ \{2,1\}
\{1, 2, 2\} ~ \{1,2\}
\{3\} ~ 3
\left\{ -1, \frac12 \right\} ~ \{0.5,-1\}
\emptyset ~ \varnothing
\{\} ~ \emptyset
\{x \mid x > 2\} ~ (2,\infty)
\{x : 1 \le x < 4\} ~ [1,4)
1,2 ~ \{1,2\}
# tuples and points
(1,2) ~ ( 1 , 2 )
\left(\frac12,3\right) ~ (0.5,3)
(2\sqrt2,\frac{\pi}{4}) ~ (\sqrt8,\pi/4)
(1,2),(3,4) ~ (3,4),(1,2)
(1,2,3) ~ [1,2,3]
\langle 1,2,3\rangle ~ (1,2,3)
(1,2) ~ 1,2
A(1,2) ~ A(1,2)
(x+1, y) ~ (1+x,y)
# intervals
[0,1) ~ \left[0,1\right)
(-\infty,2] ~ (-\infty, 2]
(-\infty, +\infty) ~ \mathbb{R}
x\in[1,2] ~ [1,2]
1\le x\le 2 ~ [1,2]
[1,2] ~ 1 \leq x \leq 2
x>3 ~ (3,\infty)
(3,+\infty) ~ x > 3
x\geqslant 0 ~ [0,\infty)
3 < x ~ x>3
2 > x > 1 ~ 1<x<2
]0,1[ ~ (0,1)
(-1,0)\cup(0,1) ~ (0,1) \cup (-1,0)
x<0 \text{ or } x>1 ~ (-\infty,0)\cup(1,\infty)
x\ne 0 ~ (-\infty,0)\cup(0,\infty)
x>1 \text{ and } x<3 ~ (1,3)
[\frac12,\infty) ~ [0.5,\infty)
a\leq 4 ~ a \le 4
2x<6 ~ x<3
-x \ge 1 ~ x\le -1
(0, 9) U (9, 36) ~ (0,9)\cup(9,36)
# matrices
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix}0.5\\2\end{pmatrix} ~ \begin{pmatrix}\frac12\\2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ (1,2)
(3,4,5) ~ \begin{pmatrix} 3 \\ 4 \\ 5 \end{pmatrix}
\left[\begin{array}{cc}1&0\\0&1\end{array}\right] ~ \begin{pmatrix}1&0\\0&1\end{pmatrix}
\begin{pmatrix} x+x \\ 1 \end{pmatrix} ~ \begin{pmatrix} 2x \\ 1\end{pmatrix}
# units
5\text{ cm} ~ 5
5 cm ~ 5\text{ centimeters}
12 \text{ square units} ~ 12
9\text{ m}^2 ~ 9 \text{ square meters}
30^\circ ~ 30
30° ~ 30^{\circ}
30 degrees ~ 30^\circ
60\text{ mph} ~ 60 miles per hour
25 apples ~ 25
3 hours ~ 3
8 \mathrm{~km} ~ 8
\frac{3}{2} \text{ hours} ~ 1.5
7\,\text{kg} ~ 7
10 m/s ~ 10
# money and percent
\$5 ~ 5
$5.00 ~ \$5
5 dollars ~ \$5
\$1,250 ~ 1250
€20 ~ 20
50\% ~ 50
50\% ~ 0.5
50 percent ~ 50\%
12.5% ~ \frac{1}{8}
\frac{1}{4} ~ 25\%
# text
\text{east} ~ East
yes ~ \text{Yes}
\text{The ellipse} ~ ellipse
\mathrm{odd} ~ odd
no solution ~ \text{No solution}
\textbf{Monday} ~ \text{Monday}
# choices
B ~ (B)
(B) ~ \text{(B)}
B. ~ B
\text{B} ~ B
\textbf{(B)} ~ B
B) 12 ~ B
(B) 12 ~ \text{B}
B: \sqrt{2} ~ B
B ~ B: \sqrt{2}
\sqrt2 ~ B: \sqrt{2}
The answer is B ~ B
Answer: (C) ~ C
option D ~ D
B, D ~ BD
D and B ~ B, D
(c) ~ C
# bases
1011_2 ~ 1011_{2}
52_{8} ~ 52_8
# wrapping
\boxed{7} ~ 7
The answer is $\boxed{7}$. ~ 7
\(7\) ~ 7
$$7$$ ~ 7
**7** ~ 7
7. ~ 7
\displaystyle \frac{1}{2} ~ \frac12
{7} ~ 7
Answer: 7 ~ 7
\fbox{7} ~ 7
\boxed{1}, \boxed{2} ~ 1,2
"""

DIFFERENT = r"""
# numbers
41 ~ 42
-42 ~ 42
42.1 ~ 42
420 ~ 42
4 2 ~ 42
1,000 ~ 1
0.33 ~ \frac13
0.3333 ~ \frac{1}{3}
3.14 ~ \pi
22/7 ~ \pi
1.41 ~ \sqrt2
1.0001 ~ 1
2.5\times 10^3 ~ 2.5\times 10^4
10^{100} ~ 10^{101}
\frac{1}{100!} ~ \frac{1}{101!}
2^{-200} ~ 0
0.1 ~ 0.01
1e3 ~ 3
two ~ 3
# fractions
\frac{3}{4} ~ \frac{4}{3}
-\frac12 ~ \frac12
\frac13 ~ \frac{13}{1}
2\frac13 ~ \frac{2}{3}
1/2 ~ 2
\frac{7}{0} ~ 7
0/1 ~ 1/0
# roots, powers, functions
\sqrt{2} ~ 2
\sqrt{2} ~ \sqrt{3}
2\sqrt3 ~ 3\sqrt2
x^2 ~ x^3
x^2 ~ 2x
2^x ~ x^2
\sin x ~ \cos x
\sin 2x ~ 2\sin x
\ln x ~ \log x
\log_2 3 ~ \log_3 2
e^x ~ e^{-x}
|x| ~ x
\sqrt{x^2} ~ x
# algebra
x+1 ~ x+2
x+y ~ x-y
2x ~ 2y
ab ~ a+b
A+B ~ a+b
x_1 ~ x_2
x_1 ~ x
(x+1)^2 ~ x^2+1
\frac{x+1}{2} ~ x+\frac12
n(n-1)/2 ~ n(n+1)/2
2\cdot 3^n ~ 3\cdot 2^n
1/2x+1 ~ 1/(2x+1)
2(3) ~ 5
f(2) ~ f(3)
x ~ y
# complex numbers
3+4i ~ 3-4i
3+4i ~ 4+3i
2i ~ 2
i ~ -i
# names, equations
x=5 ~ 6
x=5 ~ y=5
y=2x+1 ~ y=2x-1
x+y=3 ~ x-y=3
x^2+y^2=25 ~ x^2+y^2=5
11a+c=7 ~ 7
2x+z=1 ~ 1
x=1, y=2 ~ x=2, y=1
(2,1) ~ x=1, y=2
x=5=6 ~ 6
9=1 ~ 1
3x ~ x=3
# lists
1,2 ~ 1,2,3
1,2,3 ~ 1,2
1,2 ~ 1,3
5 or 6 ~ 5
5, 6 ~ 6
5 ~ 5 \text{ or } 6
3 ~ \pm 3
-3 ~ \pm 3
\pm 3 ~ 3
2\pm\sqrt3 ~ 2\pm\sqrt2
1, 1, 2 ~ 1, 2, 2
1, 2, 3, \ldots ~ 1,2,3
12 ~ 1,2
\boxed{5} or \boxed{6} ~ 6
4, 5, 6, 7, 8 ~ 6
# sets, tuples
\{1,2\} ~ \{1,3\}
\{1,2\} ~ \{1,2,3\}
(1,2) ~ (2,1)
(1,2) ~ (1,2,3)
(1,2) ~ \{1,2\}
(2,1) ~ \{1,2\}
(1,-2) ~ (1,2)
(1,2),(3,4) ~ (1,3),(2,4)
\emptyset ~ 0
\{0\} ~ \emptyset
# intervals
(0,1) ~ [0,1]
[0,1) ~ (0,1]
[0,1] ~ [0,1)
(0,1) ~ (0,2)
(-\infty,2) ~ (-\infty,2]
(2,\infty) ~ (-\infty,2)
(0,\infty) ~ (-\infty,\infty)
x>3 ~ x\ge 3
x>3 ~ x<3
x>3 ~ 3
x > 3 ~ y > 3
[1,2] ~ 1<x<2
(0,1)\cup(1,2) ~ (0,2)
(0,1) ~ (0,1)\cup(2,3)
x \ne 1 ~ x = 1
-x>1 ~ x>-1
[1,2] ~ 1,2
# matrices
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} ~ \begin{pmatrix}1&2\\0&0\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} ~ \begin{pmatrix}1&2\\3&4\end{pmatrix}
(1,2) ~ \begin{pmatrix}2\\1\end{pmatrix}
# units, percent
5\text{ cm} ~ 5\text{ m}
5 cm ~ 6 cm
5 hours ~ 5 minutes
9\text{ m}^2 ~ 9\text{ m}^3
5x ~ 5
5m ~ 5
50 ~ 0.5
50\% ~ 5
0.5\% ~ 0.5x
28 ~ 0.28
5 cents ~ 5 dollars
# text
east ~ west
\text{seat} ~ \text{east}
left ~ felt
yes ~ no
odd ~ even
not odd ~ odd
Monday ~ Tuesday
# choices
A ~ B
(A) ~ \text{(B)}
C. 12 ~ B
A or B ~ B
A, B ~ B
AB ~ B
BD ~ BC
12 ~ B
B: 3 ~ C: 3
not B ~ B
x ~ B
# bases
1011_2 ~ 1011_3
52 ~ 52_8
42 ~ 52_8
1011 ~ 1011_2
# nothing, and too much
 ~ 5
. ~ 5
? ~ 5
\text{} ~ 5
5 6 ~ 5
$ ~ 5
() ~ 5
the answer is not 5 ~ 5
5, or maybe 6 ~ 5
12:00 ~ 1:00
"""


def cases(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    return [(prediction.strip(), gold.strip()) for prediction, gold in (line.rsplit("~", 1) for line in lines)]
